//! Every link of a page to a file of the project, or to a heading of a page, leads somewhere.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use super::prose::walk;

/// The anchors of a page, as GitHub makes them of its headings.
pub(super) fn anchors(page: &str) -> Vec<String> {
    let mut seen = BTreeMap::<String, usize>::new();
    let mut fenced = false;
    let mut anchors = Vec::new();
    for line in page.lines() {
        fenced ^= line.starts_with("```");
        let title = line.trim_start_matches('#');
        if fenced || title.len() == line.len() || !title.starts_with(' ') {
            continue;
        }
        let anchor = anchor(title.trim());
        let number = seen.entry(anchor.clone()).or_default();
        anchors.push(if *number == 0 { anchor } else { format!("{anchor}-{number}") });
        *number += 1;
    }
    anchors
}

/// The anchor of a heading: its letters, digits, hyphens and underscores, with hyphens for spaces.
pub(super) fn anchor(title: &str) -> String {
    let kept = title.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c }).flat_map(char::to_lowercase).collect()
}

/// The targets of the links of a page, with their lines, without those in code.
fn links(page: &str) -> Vec<(usize, String)> {
    let mut links = Vec::new();
    let mut fenced = false;
    for (number, line) in (1..).zip(page.lines()) {
        fenced ^= line.starts_with("```");
        if fenced {
            continue;
        }
        for (at, _) in line.match_indices("](") {
            let code = line[..at].matches('`').count() % 2 == 1;
            if let Some((target, _)) = line[at + 2..].split_once(')').filter(|_| !code) {
                links.push((number, target.to_owned()));
            }
        }
    }
    links
}

/// Says what is wrong with a link of `page`, if anything is.
fn broken(page: &Path, target: &str) -> Option<String> {
    let (file, anchor) = target.split_once('#').map_or((target, None), |(f, a)| (f, Some(a)));
    let file = if file.is_empty() { page.to_owned() } else { page.parent()?.join(file) };
    if !file.exists() {
        return Some("there is no such file".to_owned());
    }
    let anchor = anchor?;
    let anchors = anchors(&fs::read_to_string(file).unwrap_or_default());
    (!anchors.iter().any(|known| known == anchor)).then(|| format!("no such heading: {anchors:?}"))
}

#[test]
fn every_link_of_a_page_leads_somewhere() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    walk(root, &mut files);
    let mut wrong = Vec::new();
    let mut count = 0;
    for page in files.iter().filter(|file| file.extension().is_some_and(|end| end == "md")) {
        for (line, target) in links(&fs::read_to_string(page).unwrap()) {
            if target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            count += 1;
            let name = page.strip_prefix(root).unwrap().display();
            wrong
                .extend(broken(page, &target).map(|why| format!("{name}:{line}: {target}: {why}")));
        }
    }
    assert!(count > 100, "the reading is broken: {count} links");
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn every_page_of_the_docs_is_in_the_index() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs");
    let index = fs::read_to_string(docs.join("README.md")).unwrap();
    let named: Vec<PathBuf> = links(&index).into_iter().map(|(_, to)| docs.join(to)).collect();
    let mut pages = Vec::new();
    walk(&docs, &mut pages);
    for page in pages.iter().filter(|page| !page.ends_with("README.md")) {
        assert!(named.contains(page), "{} is not in docs/README.md", page.display());
    }
}

#[test]
fn anchors_are_those_of_github() {
    let page =
        "# `not ready`\n## A backlog, e.g. two\n```\n# code\n```\n## A backlog, e.g. two\n#no\n";
    assert_eq!(anchors(page), ["not-ready", "a-backlog-eg-two", "a-backlog-eg-two-1"]);
    assert_eq!(anchor("as --max-connections needs"), "as---max-connections-needs");
}

#[test]
fn links_in_code_are_none() {
    let page = "[a](b) and `[c](d)`\n```\n[e](f)\n```\n[g](h#i)\n";
    assert_eq!(links(page), [(1, "b".to_owned()), (5, "h#i".to_owned())]);
}
