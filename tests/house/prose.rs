//! Plain English, counted: long sentences, sentences that begin with a relative clause, long
//! parentheses, and words that plain English does not use.
//!
//! `cargo test --test house prose -- --nocapture` reads `PROSE` from the environment. `1` prints the
//! counts of every text. The beginning of a path, such as `src/lease` or `docs/`, prints the counts and
//! the offenders of the texts there. `names` prints the names of tests that name their subject late.

mod sentences;

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
};

use sentences::{PROTO, RUST, SCRIPT, Sentence};

/// Longest sentence that counts as short, in words.
const LONG: usize = 30;
/// Longest parenthesis that counts as short, in words.
const LONG_PARENTHESIS: usize = 8;

/// The kinds of fault, each with the share of sentences that may have it, in percent.
const KINDS: [(&str, usize); 4] =
    [("long", 5), ("fronted", 3), ("long parenthesis", 3), ("uncommon word", 3)];

/// Sentences that begin like this name their subject late.
const FRONTED: [&str; 7] = ["What", "Where", "Of", "Who", "Whoever", "Whom", "Those"];

/// Words and phrases that have a plainer word.
const UNCOMMON: [&str; 44] = [
    "albeit",
    "all the same",
    "anew",
    "are believed",
    "are taken for",
    "are told",
    "as of",
    "be told",
    "beside",
    "by whoever",
    "by whomever",
    "distrusted",
    "distrusts",
    "for ever",
    "forthwith",
    "go on",
    "goes on",
    "hears on",
    "hence",
    "hereby",
    "hitherto",
    "in vain",
    "is believed",
    "is taken for",
    "is told",
    "lest",
    "let go",
    "lets go",
    "nevertheless",
    "serve on",
    "served on",
    "serves on",
    "take along",
    "takes along",
    "thereby",
    "therein",
    "thereof",
    "upon",
    "was told",
    "were told",
    "whence",
    "whereby",
    "whilst",
    "whomever",
];

/// The share of names of tests that may begin with a fronted word, in percent.
const FRONTED_NAMES: usize = 3;

/// A text that has one verdict.
#[derive(Default)]
struct Text {
    sentences: usize,
    /// For each kind, the file and line of an offender, and the offender.
    offenders: [Vec<(String, usize, String)>; 4],
}

impl Text {
    fn add(&mut self, file: &str, sentences: &[Sentence]) {
        self.sentences += sentences.len();
        for Sentence { line, text } in sentences {
            for (kind, offenders) in faults(text).into_iter().zip(&mut self.offenders) {
                if kind {
                    offenders.push((file.to_owned(), *line, text.clone()));
                }
            }
        }
    }

    /// For each kind, the share of offenders in percent, rounded up.
    fn shares(&self) -> [usize; 4] {
        self.offenders.each_ref().map(|found| (found.len() * 100).div_ceil(self.sentences.max(1)))
    }

    fn summary(&self, name: &str) -> String {
        let [long, fronted, parentheses, uncommon] = self.offenders.each_ref().map(Vec::len);
        let shares = self.shares();
        let above = shares.iter().zip(KINDS).any(|(share, (_, most))| *share > most);
        let mark = if above { "above" } else { "" };
        format!(
            "{name:34} {:5} sentences {long:4} long {fronted:4} fronted {parentheses:4} long \
             parentheses {uncommon:4} uncommon  {shares:?} % {mark}",
            self.sentences
        )
    }

    /// The offenders of the `wanted` kinds, in the order of the files.
    fn list(&self, wanted: impl Fn(usize) -> bool) -> Vec<String> {
        let kinds = self.offenders.iter().zip(KINDS).enumerate().filter(|(kind, _)| wanted(*kind));
        let each = kinds.flat_map(|(_, (found, (kind, _)))| found.iter().map(move |at| (at, kind)));
        let mut each: Vec<_> = each.collect();
        each.sort();
        each.into_iter()
            .map(|((file, line, text), kind)| format!("  {file}:{line}: {kind}: {text}"))
            .collect()
    }
}

/// For each kind, whether a sentence is of it.
pub(super) fn faults(sentence: &str) -> [bool; 4] {
    let words = || sentence.split_whitespace().filter(|word| sentences::counts(word));
    let first = words().next().unwrap_or("").trim_matches(|c: char| !c.is_alphabetic());
    let question =
        sentence.trim_end_matches(|c: char| !c.is_alphanumeric() && c != '?').ends_with('?');
    let bare = words().map(|word| word.trim_matches(|c: char| !c.is_alphanumeric()).to_lowercase());
    let plain = format!(" {} ", bare.collect::<Vec<_>>().join(" "));
    [
        words().count() > LONG,
        FRONTED.contains(&first) && !question,
        parentheses(sentence).any(|inside| inside.split_whitespace().count() > LONG_PARENTHESIS),
        UNCOMMON.iter().any(|word| plain.contains(&format!(" {word} "))),
    ]
}

fn parentheses(sentence: &str) -> impl Iterator<Item = &str> {
    let inside = |rest: &'_ str| rest.find(')').unwrap_or(rest.len());
    sentence.split('(').skip(1).map(move |rest| &rest[..inside(rest)])
}

/// Every text of the project: a page, a contract, a folder of code.
fn texts() -> BTreeMap<String, Text> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    walk(root, &mut files);
    let mut texts = BTreeMap::<String, Text>::new();
    for path in files {
        let name = path.strip_prefix(root).unwrap().to_str().unwrap();
        let Ok(content) = fs::read_to_string(&path) else { continue };
        let script = content.starts_with("#!");
        let (text, sentences) = match path.extension().and_then(|end| end.to_str()) {
            Some("md") => (name.to_owned(), sentences::of_markdown(&content)),
            Some("proto") => (name.to_owned(), sentences::of_comments(&content, PROTO)),
            Some("rs" | "go" | "java" | "ts") => {
                (folder(name), sentences::of_comments(&content, RUST))
            }
            Some("py") => (folder(name), sentences::of_comments(&content, SCRIPT)),
            None if script => (folder(name), sentences::of_comments(&content, SCRIPT)),
            _ => continue,
        };
        texts.entry(text).or_default().add(name, &sentences);
    }
    texts
}

/// `src/lease` for all of a module, `tests/wire` for a target, `scripts` for its files.
fn folder(file: &str) -> String {
    let mut parts = file.split('/');
    match (parts.next(), parts.next()) {
        (Some(top @ ("src" | "tests" | "benches" | "examples" | "clients")), Some(second)) => {
            format!("{top}/{}", second.trim_end_matches(".rs"))
        }
        (Some(top), _) => top.to_owned(),
        (None, _) => file.to_owned(),
    }
}

/// All files but those that others made.
pub(super) fn walk(folder: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        let made = ["target", "node_modules", "gen", "dist", "__pycache__"].contains(&name);
        if path.is_dir() {
            if !made && !name.starts_with('.') {
                walk(&path, into);
            }
        } else {
            into.push(path);
        }
    }
    into.sort();
}

#[test]
fn prose_is_plain_english() {
    let texts = texts();
    assert!(texts.len() > 40, "the walk is broken");
    match env::var("PROSE").as_deref() {
        Err(_) | Ok("") => {}
        Ok("1") => {
            for (name, text) in &texts {
                println!("{}", text.summary(name));
            }
        }
        Ok(prefix) => {
            for (name, text) in &texts {
                let here = text.list(|_| true).into_iter();
                let here: Vec<_> = here.filter(|at| at.trim_start().starts_with(prefix)).collect();
                if name.starts_with(prefix) || !here.is_empty() {
                    println!("{}\n{}", text.summary(name), here.join("\n"));
                }
            }
            return;
        }
    }
    let mut report = String::new();
    for (name, text) in &texts {
        let shares = text.shares();
        let above = |kind: usize| shares[kind] > KINDS[kind].1;
        if (0..4).any(above) {
            report += &(text.summary(name) + "\n");
            report += &(text.list(above).join("\n") + "\n");
        }
    }
    assert!(report.is_empty(), "\n{report}");
}

/// The names of the tests of a file, with their lines.
fn tests_of(code: &str) -> Vec<(usize, &str)> {
    let mut names = Vec::new();
    let mut attributed = false;
    for (number, line) in (1..).zip(code.lines()) {
        let line = line.trim();
        attributed |= ["#[test]", "#[tokio::test"].iter().any(|mark| line.starts_with(mark));
        let function = line.trim_start_matches("async ").strip_prefix("fn ");
        if let Some((name, _)) = function.filter(|_| attributed).and_then(|f| f.split_once('(')) {
            names.push((number, name));
            attributed = false;
        }
    }
    names
}

#[test]
fn names_of_tests_begin_with_their_subject() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    walk(root, &mut files);
    let (mut count, mut offenders) = (0, Vec::new());
    for file in files.iter().filter(|file| file.extension().is_some_and(|end| end == "rs")) {
        let place = file.strip_prefix(root).unwrap().display();
        for (line, name) in tests_of(&fs::read_to_string(file).unwrap()) {
            count += 1;
            let (first, _) = name.split_once('_').unwrap_or((name, ""));
            if FRONTED.iter().any(|word| word.to_lowercase() == first) {
                offenders.push(format!("  {place}:{line}: {name}"));
            }
        }
    }
    assert!(count > 400, "the reading is broken: {count} tests");
    let share = (offenders.len() * 100).div_ceil(count);
    let list = format!("{share} % of {count} names\n{}", offenders.join("\n"));
    if env::var("PROSE").as_deref() == Ok("names") {
        println!("{list}");
    }
    assert!(share <= FRONTED_NAMES, "\n{list}");
}

#[test]
fn test_is_named_by_its_function() {
    let code = "fn a() {}\n#[test]\nfn b() {\n    fn c() {}\n}\n#[tokio::test(flavor = \"x\")]\n\
                #[ignore]\nasync fn d(e: u8) {}\n";
    assert_eq!(tests_of(code), [(3, "b"), (8, "d")]);
}

#[test]
fn each_kind_of_fault_is_found() {
    let long = "word ".repeat(LONG + 1);
    assert_eq!(faults(&long), [true, false, false, false]);
    assert_eq!(faults(&long["word ".len()..]), [false; 4]);
    for fronted in
        ["What is here ends.", "**Where it ends.", "Whoever asks is answered.", "(Of two, one.)"]
    {
        assert_eq!(faults(fronted), [false, true, false, false], "{fronted}");
    }
    for plain in ["What is a lease?", "Often it ends.", "Whole answers are here.", "Those?"] {
        assert_eq!(faults(plain), [false; 4], "{plain}");
    }
    assert!(faults("It ends (a b c d e f g h i) here.")[2]);
    assert!(faults("It ends (a b c d e f g h i")[2], "cut off by a full stop inside");
    assert!(!faults("It ends (a b c d e f g h) and (i) here.")[2]);
    for uncommon in ["It is made anew.", "It goes\non, then ends.", "\"All the same\", it ends."] {
        assert!(faults(uncommon)[3], "{uncommon}");
    }
    assert!(!faults("It is renewed, besides, and is toldable.")[3]);
}

#[test]
fn shares_are_rounded_up() {
    let mut text = Text::default();
    let sentences: Vec<_> =
        (1..=34).map(|line| Sentence { line, text: "It ends here.".to_owned() }).collect();
    text.add("a.md", &sentences[1..]);
    text.add("b.md", &[Sentence { line: 7, text: "What ends is here.".to_owned() }]);
    assert_eq!(text.shares(), [0, 3, 0, 0]);
    assert_eq!(text.list(|_| true), ["  b.md:7: fronted: What ends is here."]);
}

#[test]
fn text_of_a_file_is_its_page_or_its_folder() {
    for (file, text) in [
        ("src/lease.rs", "src/lease"),
        ("src/lease/store.rs", "src/lease"),
        ("tests/wire/main.rs", "tests/wire"),
        ("benches/lease_table.rs", "benches/lease_table"),
        ("examples/go/worker.go", "examples/go"),
        ("clients/go/worker.go", "clients/go"),
        ("scripts/demo", "scripts"),
        ("build.rs", "build.rs"),
    ] {
        assert_eq!(folder(file), text);
    }
}
