//! The source as the tests of the house read it: files, code without comments, and which file names
//! which.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// One file of `src`, as code without comments and without the tests at its end.
pub struct File {
    /// The path inside `src`, like `nats/inbox.rs`.
    pub path: String,
    /// The module path, like `["nats", "inbox"]`; empty for `lib.rs` and `main.rs`.
    pub module: Vec<String>,
    /// The whole text.
    pub text: String,
    /// Each line of code with its number.
    pub code: Vec<(usize, String)>,
}

impl File {
    /// The first part of the module path: the room that the file belongs to.
    pub fn room(&self) -> &str {
        self.module.first().map_or_else(|| self.path.trim_end_matches(".rs"), String::as_str)
    }
}

/// The folder of the sources.
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// All files of `src`, in the order of their paths.
pub fn files() -> Vec<File> {
    let mut paths = Vec::new();
    walk(&folder(), &mut paths);
    paths.sort();
    assert!(paths.len() > 20, "the walk is broken");
    paths.iter().map(|path| read(path)).collect()
}

/// The texts of all files of a folder, one after the other.
pub fn texts(folder: &Path) -> String {
    let mut paths = Vec::new();
    walk(folder, &mut paths);
    paths.iter().map(|path| fs::read_to_string(path).unwrap()).collect()
}

fn walk(folder: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            walk(&path, into);
        } else if path.extension().is_some_and(|end| end == "rs") {
            into.push(path);
        }
    }
}

fn read(file: &Path) -> File {
    let path = file.strip_prefix(folder()).unwrap().to_str().unwrap().to_owned();
    let text = fs::read_to_string(file).unwrap();
    let code = text.split("#[cfg(test)]").next().unwrap();
    let code = (1..).zip(code.lines());
    let code = code.map(|(number, line)| (number, line.split("//").next().unwrap().to_owned()));
    let code = code.collect();
    let module = match path.trim_end_matches(".rs") {
        "lib" | "main" => Vec::new(),
        inside => inside.split('/').map(str::to_owned).collect(),
    };
    File { path, module, text, code }
}

/// The names of modules that a file's code uses, as absolute module paths that may end in an item.
pub fn uses(file: &File) -> Vec<Vec<String>> {
    let code: Vec<&str> = file.code.iter().map(|(_, line)| line.as_str()).collect();
    let code = code.join("\n");
    let (mut paths, mut rest) = (Vec::new(), String::new());
    for statement in code.split_inclusive(';') {
        let declared = statement.trim_start().trim_start_matches("pub(super)");
        let declared = declared.trim_start_matches("pub(crate)").trim_start_matches("pub");
        match declared.trim_start().strip_prefix("use ") {
            Some(tree) => expand("", tree.trim_end_matches(';'), &mut paths),
            None => rest += statement,
        }
    }
    for word in rest.split(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':')) {
        paths.push(word.to_owned());
    }
    paths.iter().filter_map(|path| absolute(path, &file.module)).collect()
}

/// Writes out a tree like `crate::{a::{B, C}, d}` as its paths.
fn expand(prefix: &str, tree: &str, into: &mut Vec<String>) {
    let tree = tree.trim();
    let Some((before, inside)) = tree.split_once('{') else {
        into.push(format!("{prefix}{tree}"));
        return;
    };
    let inside = inside.trim_end().strip_suffix('}').unwrap_or(inside);
    let prefix = format!("{prefix}{}", before.trim());
    let (mut depth, mut start) = (0, 0);
    for (at, c) in inside.char_indices().chain([(inside.len(), ',')]) {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                if !inside[start..at].trim().is_empty() {
                    expand(&prefix, &inside[start..at], into);
                }
                start = at + 1;
            }
            _ => {}
        }
    }
}

/// A path from the root of the crate. `None` for a path of another crate.
fn absolute(path: &str, module: &[String]) -> Option<Vec<String>> {
    let mut parts = path.split("::").map(str::trim);
    let mut base = match parts.next()? {
        "crate" | "fetch_proxy" => Vec::new(),
        "self" => module.to_vec(),
        "super" => module[..module.len().saturating_sub(1)].to_vec(),
        _ => return None,
    };
    for part in parts {
        match part {
            "super" => drop(base.pop()),
            part => base.push(part.to_owned()),
        }
    }
    Some(base)
}

/// The arrows between files: from each file to the files that it names. A file and the module that
/// it is a part of are one thing here, so an arrow to a parent does not count.
pub fn arrows(files: &[File]) -> BTreeMap<&str, BTreeSet<&str>> {
    let of_module: BTreeMap<&[String], &File> = files
        .iter()
        .filter(|file| !file.module.is_empty())
        .map(|file| (&*file.module, file))
        .collect();
    let mut arrows: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for file in files {
        let named = arrows.entry(&file.path).or_default();
        for path in uses(file) {
            let target = (1..=path.len()).rev().find_map(|length| of_module.get(&path[..length]));
            let Some(target) = target else { continue };
            let is_parent = file.module.starts_with(&target.module);
            if !is_parent {
                named.insert(&target.path);
            }
        }
    }
    arrows
}

/// Groups of names that reach each other along the arrows.
pub fn circles<'a>(arrows: &BTreeMap<&'a str, BTreeSet<&'a str>>) -> Vec<BTreeSet<&'a str>> {
    let reached = |from: &'a str| {
        let (mut seen, mut open) = (BTreeSet::new(), vec![from]);
        while let Some(at) = open.pop() {
            for next in arrows.get(at).into_iter().flatten() {
                if seen.insert(*next) {
                    open.push(next);
                }
            }
        }
        seen
    };
    let reached: BTreeMap<&str, BTreeSet<&str>> =
        arrows.keys().map(|name| (*name, reached(name))).collect();
    let mut circles: Vec<BTreeSet<&str>> = Vec::new();
    for (name, there) in &reached {
        let back = |other: &&&str| reached.get(**other).is_some_and(|back| back.contains(name));
        let circle: BTreeSet<&str> = there.iter().filter(back).copied().collect();
        if !circle.is_empty() && !circles.contains(&circle) {
            circles.push(circle);
        }
    }
    circles
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn use_trees_are_written_out() {
        let mut paths = Vec::new();
        expand("", "crate::{a::{B, c::D}, e, super::f}", &mut paths);
        assert_eq!(paths, ["crate::a::B", "crate::a::c::D", "crate::e", "crate::super::f"]);
    }

    #[test]
    fn relative_paths_become_absolute() {
        let module = ["a".to_owned(), "b".to_owned()];
        assert_eq!(absolute("super::c", &module).unwrap(), ["a", "c"]);
        assert_eq!(absolute("self::c::D", &module).unwrap(), ["a", "b", "c", "D"]);
        assert_eq!(absolute("std::fs", &module), None);
    }

    #[test]
    fn names_that_reach_each_other_are_a_circle() {
        let arrows = [("a", vec!["b"]), ("b", vec!["c"]), ("c", vec!["b"]), ("d", vec!["a"])];
        let arrows = arrows.map(|(from, to)| (from, to.into_iter().collect()));
        assert_eq!(circles(&arrows.into()), [BTreeSet::from(["b", "c"])]);
    }
}
