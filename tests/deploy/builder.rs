//! `scripts/image`: which of docker, podman and buildah it takes, and what it asks of it. Scripts
//! play the builders and record their arguments.

use std::{
    env, fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    process::{Command, Output},
};

use tempfile::TempDir;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// A PATH with these builders and what the script itself needs.
struct Machine {
    bin: TempDir,
}

impl Machine {
    fn with(builders: &[&str]) -> Self {
        let bin = tempfile::tempdir().unwrap();
        let path = env::var_os("PATH").unwrap();
        for tool in ["bash", "env", "dirname", "sed", "head", "git"] {
            let mut found = env::split_paths(&path).map(|folder| folder.join(tool));
            let found = found.find(|file| file.is_file()).unwrap_or_else(|| panic!("no {tool}"));
            symlink(found, bin.path().join(tool)).unwrap();
        }
        for builder in builders {
            let (name, ends) = builder.split_once(' ').unwrap_or((builder, ""));
            let file = bin.path().join(name);
            let script = "#!/usr/bin/env bash\n\
                printf '%s\\n' \"${0##*/}\" \"$@\" >>\"$HEARD\"\n";
            fs::write(&file, format!("{script}{ends}\n")).unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        }
        Self { bin }
    }

    /// The result of `scripts/image NAME`, and the arguments of the builder, one word a line.
    fn image(&self, variables: &[(&str, &str)]) -> (Output, String) {
        let heard = self.bin.path().join("heard");
        let output = Command::new("scripts/image")
            .arg("somewhere/fetch-proxy:v1")
            .current_dir(ROOT)
            .env_remove("BUILDER")
            .env_remove("REGISTRY")
            .env_remove("BASE")
            .env("PATH", self.bin.path())
            .env("HEARD", &heard)
            .envs(variables.iter().copied())
            .output()
            .unwrap();
        (output, fs::read_to_string(heard).unwrap_or_default())
    }
}

#[test]
fn image_script_takes_the_first_builder_that_works() {
    for (builders, variables, taken) in [
        (&["docker", "podman", "buildah"][..], &[][..], "docker"),
        // A client whose daemon does not run.
        (&["docker exit 1", "podman", "buildah"], &[], "podman"),
        (&["podman", "buildah"], &[], "podman"),
        (&["buildah"], &[], "buildah"),
        (&["docker", "podman", "buildah"], &[("BUILDER", "buildah")], "buildah"),
    ] {
        let (output, heard) = Machine::with(builders).image(variables);
        assert!(output.status.success(), "{builders:?}: {output:?}");
        let words: Vec<&str> = heard.lines().collect();
        let build = words.iter().position(|word| *word == "build").expect("it builds");
        assert_eq!(words[build - 1], taken, "{builders:?}");
        let revision = Command::new("git").args(["rev-parse", "HEAD"]).current_dir(ROOT).output();
        let revision = String::from_utf8(revision.unwrap().stdout).unwrap();
        let version = env!("CARGO_PKG_VERSION");
        let expected = [
            "--quiet",
            "--file",
            "deploy/Dockerfile",
            "--tag",
            "somewhere/fetch-proxy:v1",
            "--build-arg",
            "REGISTRY=",
            "--build-arg",
            &format!("VERSION={version}"),
            "--build-arg",
            &format!("REVISION={}", revision.trim()),
            ".",
        ];
        assert_eq!(words[build + 1..], expected, "{builders:?}");
    }
}

#[test]
fn image_script_names_what_it_cannot_do() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().to_str().unwrap();
    for (builders, variables, said) in [
        (&[][..], &[][..], "docker, podman, buildah"),
        (&["docker exit 1"], &[], "docker, podman, buildah"),
        (&["buildah"], &[("BUILDER", "podman")], "none of these works here: podman"),
        (&["docker"], &[("BASE", base)], "BASE needs buildah"),
    ] {
        let (output, heard) = Machine::with(builders).image(variables);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{builders:?}: {error}");
        assert!(error.contains(said), "{builders:?}: {error}");
        assert!(!heard.lines().any(|word| word == "build"), "{heard}");
    }
}

#[test]
fn registry_and_base_reach_the_builder() {
    let (_, heard) = Machine::with(&["podman"]).image(&[("REGISTRY", "mirror/")]);
    assert!(heard.lines().any(|word| word == "REGISTRY=mirror/"), "{heard}");
    let (_, heard) = Machine::with(&["buildah"]).image(&[("BASE", "/made")]);
    assert!(heard.contains("--build-context\nbuild=/made\n"), "{heard}");
}
