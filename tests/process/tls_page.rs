//! The page about TLS: the commands under "Try it" do what the page says.

use std::{
    fs,
    io::{self, Write as _},
    os::unix::fs::symlink,
    path::Path,
    process::Command,
};

use testkit::eventually;

use super::dev::Dev;

/// The blocks of commands below a heading of the page.
fn blocks(heading: &str) -> Vec<String> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/how-to/tls.md");
    let page = fs::read_to_string(page).unwrap();
    let (_, below) = page.split_once(&format!("\n## {heading}\n")).unwrap();
    let part = below.split("\n## ").next().unwrap();
    let fenced = part.split("```").skip(1).step_by(2);
    fenced.map(|block| block.split_once('\n').unwrap().1.to_owned()).collect()
}

/// Runs commands in a folder whose `bin` has the programs of the page. Returns their output.
fn run(commands: &str, folder: &Path) -> String {
    let path = format!("{}:{}", folder.join("bin").display(), std::env::var("PATH").unwrap());
    let output = Command::new("bash")
        .args(["-euo", "pipefail", "-c", commands])
        .current_dir(folder)
        .env("PATH", path)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{commands}\n{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    said
}

#[tokio::test]
async fn commands_of_the_page_about_tls_make_certificates_serve_with_them_and_fetch() {
    if Command::new("openssl").arg("version").output().is_err() {
        // Not by a macro, whose output a test that passes does not show.
        writeln!(io::stderr(), "NOT TESTED: the page about TLS: there is no openssl").unwrap();
        return;
    }
    let blocks = blocks("Try it");
    let [make, serve, fetch] = &*blocks else { panic!("{blocks:?}") };
    let folder = tempfile::tempdir().unwrap();
    let grpcurl = std::env::var("FETCH_PROXY_TEST_GRPCURL").unwrap();
    fs::create_dir(folder.path().join("bin")).unwrap();
    for (name, program) in
        [("fetch-proxy", env!("CARGO_BIN_EXE_fetch-proxy")), ("grpcurl", &grpcurl)]
    {
        symlink(program, folder.path().join("bin").join(name)).unwrap();
    }
    run(make, folder.path());
    assert!(serve.ends_with("\nfetch-proxy dev\n"), "{serve}");
    let variables = serve.split_whitespace().filter_map(|word| word.split_once('='));
    let in_folder = |file: &str| folder.path().join(file).to_str().unwrap().to_owned();
    let variables: Vec<_> =
        variables.map(|(name, file)| (name.to_owned(), in_folder(file))).collect();
    assert_eq!(variables.len(), 3, "{serve}");
    let dev = Dev::start_with(&variables);
    let address = eventually("the ports file", || async { dev.address() }).await;
    let port = address.rsplit_once(':').unwrap().1;
    let fetch = fetch.replace(":50051", &format!(":{port}"));
    let (health, rest) = fetch.split_once('\n').unwrap();
    eventually("readiness", || async {
        run(health, folder.path()).contains("\"SERVING\"").then_some(())
    })
    .await;
    let said = run(rest, folder.path());
    assert!(said.starts_with("SERVING\n"), "{said}");
    assert!(said.contains("tasks.sample.1"), "{said}");
}
