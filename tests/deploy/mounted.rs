//! The files of a pod, as Kubernetes mounts them: each folder is a link, and all of its files change at once.

use std::{fs, os::unix::fs::symlink, path::Path};

use tempfile::TempDir;

/// The folder that the chart mounts all files in.
const IN_THE_POD: &str = "/etc/fetch-proxy/";

pub struct Mounted {
    folder: TempDir,
    versions: usize,
}

impl Mounted {
    pub fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), versions: 0 }
    }

    /// Gives a folder these files, in place of the files that it has.
    pub fn put(&mut self, folder: &str, files: &[(&str, &str)]) {
        self.versions += 1;
        let at = |name: &str| self.folder.path().join(name);
        let (version, link) = (at(&format!("{folder}.{}", self.versions)), at("link"));
        fs::create_dir(&version).unwrap();
        for (name, text) in files {
            fs::write(version.join(name), text).unwrap();
        }
        symlink(version, &link).unwrap();
        fs::rename(link, at(folder)).unwrap();
    }

    /// Where a file is on this machine. Other text stays as it is.
    pub fn path(&self, in_the_pod: &str) -> String {
        let here = |rest: &str| Path::join(self.folder.path(), rest).display().to_string();
        in_the_pod.strip_prefix(IN_THE_POD).map_or_else(|| in_the_pod.to_owned(), here)
    }
}
