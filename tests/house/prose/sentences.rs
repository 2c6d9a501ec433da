//! The sentences of Markdown and of comments, each with its line. Code counts as one word, a link
//! as its text.

/// Marks of comments. The longer of two that fit comes first.
pub const RUST: &[&str] = &["//!", "///", "//"];
pub const PROTO: &[&str] = &["//"];
pub const SCRIPT: &[&str] = &["#"];

/// Fewer words are a label, not a sentence.
const SHORTEST: usize = 3;
/// A full stop after these ends no sentence.
const ABBREVIATIONS: [&str; 7] = ["e.g.", "i.e.", "cf.", "vs.", "approx.", "resp.", "incl."];
/// Stands in the text for a piece of code, or for a bare address.
const CODE: &str = "Code";

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sentence {
    /// The line of its first word, from 1.
    pub line: usize,
    pub text: String,
}

/// The running text of a page: paragraphs, list items and table cells.
pub fn of_markdown(page: &str) -> Vec<Sentence> {
    let mut reader = Reader::default();
    for (number, line) in (1..).zip(page.lines()) {
        reader.line(number, line);
    }
    reader.end()
}

/// The running text of the comments that stand on lines of their own, or after a semicolon.
pub fn of_comments(code: &str, marks: &[&str]) -> Vec<Sentence> {
    let mut reader = Reader::default();
    let mut last = "";
    for (number, line) in (1..).zip(code.lines()) {
        let line = line.trim();
        let whole = marks.iter().find_map(|mark| Some((*mark, line.strip_prefix(mark)?)));
        let trailing = || {
            let (_, comment) = line.split_once("; // ")?;
            marks.contains(&"//").then_some(("; //", comment))
        };
        let (mark, comment) = whole.or_else(trailing).unwrap_or(("", ""));
        // A different mark belongs to something else: the head of a file, and its first item.
        if mark != last {
            reader.line(number, "");
            reader.fenced = false;
        }
        last = mark;
        // `#!/bin/sh`, and a commented setting of a script.
        let prose = if comment.starts_with(['!', '#']) && mark == "#" { "" } else { comment };
        reader.line(number, prose);
    }
    reader.end()
}

/// Paragraphs in the making, from lines.
#[derive(Default)]
struct Reader {
    found: Vec<Sentence>,
    /// The lines of the paragraph that is being read, with their numbers.
    paragraph: Vec<(usize, String)>,
    /// Inside of a block of code.
    fenced: bool,
    /// Inside of an HTML comment.
    hidden: bool,
}

impl Reader {
    fn line(&mut self, number: usize, line: &str) {
        let line = line.trim();
        if line.starts_with("```") || line.starts_with("~~~") {
            self.fenced = !self.fenced;
            return self.close();
        }
        if line.starts_with("<!--") {
            self.hidden = true;
        }
        if self.fenced || self.hidden {
            self.hidden &= !line.contains("-->");
            return;
        }
        let line = line.trim_start_matches(['>', ' ']);
        let heading = line.starts_with('#') && line.trim_start_matches('#').starts_with(' ');
        let definition = line.starts_with('[') && line.contains("]: ");
        if line.is_empty() || heading || definition || line.starts_with(['|', '<']) {
            self.close();
        }
        if line.starts_with('|') {
            let cells = plain(&[(number, line.to_owned())]);
            for cell in cells.split(|(c, _)| *c == '|') {
                self.take(cell);
            }
        } else if let Some(item) = item(line) {
            self.close();
            self.paragraph.push((number, item.to_owned()));
        } else if !(line.is_empty() || heading || definition || line.starts_with('<')) {
            self.paragraph.push((number, line.to_owned()));
        }
    }

    fn close(&mut self) {
        let paragraph = std::mem::take(&mut self.paragraph);
        self.take(&plain(&paragraph));
    }

    fn take(&mut self, text: &[(char, usize)]) {
        self.found.extend(sentences(text));
    }

    fn end(mut self) -> Vec<Sentence> {
        self.close();
        self.found
    }
}

/// The text of an item of a list.
fn item(line: &str) -> Option<&str> {
    let bullet = ["- ", "* ", "+ "].iter().find_map(|mark| line.strip_prefix(mark));
    let numbered = || {
        let (number, rest) = line.split_once(['.', ')'])?;
        let digits = !number.is_empty() && number.chars().all(|c| c.is_ascii_digit());
        rest.strip_prefix(' ').filter(|_| digits)
    };
    bullet.or_else(numbered)
}

/// The text of a paragraph without its markup, each character with its line.
fn plain(paragraph: &[(usize, String)]) -> Vec<(char, usize)> {
    let mut raw = Vec::new();
    for (number, line) in paragraph {
        raw.extend(line.chars().map(|c| (c, *number)));
        raw.push((' ', *number));
    }
    let is = |at: usize, c: char| raw.get(at).is_some_and(|(found, _)| *found == c);
    let starts = |at: usize, text: &str| text.chars().enumerate().all(|(n, c)| is(at + n, c));
    let after = |at: usize, c: char| (at..raw.len()).find(|at| is(*at, c)).map(|at| at + 1);
    let mut text = Vec::new();
    let mut at = 0;
    while at < raw.len() {
        let (c, line) = raw[at];
        let code = |text: &mut Vec<_>| text.extend(CODE.chars().map(|c| (c, line)));
        let ticks = (at..raw.len()).take_while(|at| is(*at, '`')).count();
        let next = match c {
            '`' => {
                let fence = "`".repeat(ticks);
                let close = (at + ticks..raw.len()).find(|at| starts(*at, &fence));
                code(&mut text);
                close.map(|close| close + ticks)
            }
            '\\' => {
                // An escaped pipe is no border of a cell.
                text.push(('/', line));
                Some(at + 2)
            }
            ']' if is(at + 1, '(') => after(at, ')'),
            ']' if is(at + 1, '[') => after(at + 1, ']'),
            '<' if starts(at, "<http") => {
                code(&mut text);
                after(at, '>')
            }
            '[' | ']' | '*' => Some(at + 1),
            '!' if is(at + 1, '[') => Some(at + 2),
            _ => {
                text.push((c, line));
                Some(at + 1)
            }
        };
        at = next.unwrap_or(at + 1);
    }
    text
}

/// Cuts running text: a sentence ends with its stop, and a space after it.
fn sentences(text: &[(char, usize)]) -> Vec<Sentence> {
    let mut found = Vec::new();
    let mut words: Vec<(String, usize)> = Vec::new();
    let pieces = text.split(|(c, _)| c.is_whitespace()).filter(|piece| !piece.is_empty());
    let all: Vec<_> =
        pieces.map(|piece| (piece.iter().map(|(c, _)| c).collect(), piece[0].1)).collect();
    let mut end = |words: &mut Vec<(String, usize)>| {
        let number = words.iter().filter(|(word, _)| counts(word)).count();
        if number >= SHORTEST {
            let text: Vec<_> = words.iter().map(|(word, _)| word.as_str()).collect();
            found.push(Sentence { line: words[0].1, text: text.join(" ") });
        }
        words.clear();
    };
    for (number, word) in all.iter().enumerate() {
        words.push(word.clone());
        let small =
            all.get(number + 1).is_some_and(|(next, _)| next.starts_with(char::is_lowercase));
        if stops(&word.0, small) {
            end(&mut words);
        }
    }
    end(&mut words);
    found
}

/// Whether a sentence ends with this word, if the next begins with a `small` letter or not.
fn stops(word: &str, small: bool) -> bool {
    let bare = word.trim_end_matches([')', '"', '\'', '”', '’']);
    let abbreviated = ABBREVIATIONS.iter().any(|short| bare.trim_start_matches('(') == *short);
    let omitted = bare.ends_with("..") || bare == "etc.";
    bare.ends_with(['.', '!', '?']) && !abbreviated && !(omitted && small)
}

/// Whether this is a word, and not a dash.
pub fn counts(word: &str) -> bool {
    word.chars().any(char::is_alphanumeric)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn markdown(page: &str) -> Vec<(usize, String)> {
        of_markdown(page).into_iter().map(|sentence| (sentence.line, sentence.text)).collect()
    }

    fn texts(page: &str) -> Vec<String> {
        of_markdown(page).into_iter().map(|sentence| sentence.text).collect()
    }

    #[test]
    fn sentence_ends_with_its_stop_and_keeps_its_line() {
        let page = "One two three. four five six!\nseven eight (nine.) Ten eleven\ntwelve?";
        let expected = [
            (1, "One two three."),
            (1, "four five six!"),
            (2, "seven eight (nine.)"),
            (2, "Ten eleven twelve?"),
        ];
        assert_eq!(markdown(page), expected.map(|(line, text)| (line, text.to_owned())));
    }

    #[test]
    fn abbreviation_and_number_end_no_sentence() {
        let page = "Some names, e.g. `TASKS`, i.e. streams (cf. NATS), take 2.5 ms in 2.10.16 etc. or more.";
        assert_eq!(texts(page).len(), 1, "{:?}", texts(page));
        assert_eq!(
            texts("It does this and ... so on. It takes streams etc. Then it ends here.").len(),
            3
        );
    }

    #[test]
    fn code_and_links_count_as_their_words() {
        let page = "See `a. B. c`, [the page](x.md#a), [`Foo`][crate::foo], ![a picture](p.png) and <https://a.b>.";
        assert_eq!(texts(page), ["See Code, the page, Code, a picture and Code."]);
        assert_eq!(
            texts("A **bold** word in `code that\ngoes on. And on` and more."),
            ["A bold word in Code and more."]
        );
        assert_eq!(texts("The word ``a ` b`` is code."), ["The word Code is code."]);
    }

    #[test]
    fn blocks_of_code_headings_and_comments_are_left_out() {
        let page = "# What a heading is\n\n```text\nWhat is in here. Is code.\n```\n\n<!-- What is\nhidden here too -->\nThis is read here.\n\n[link]: what is this here\n~~~\nNot this one either.\n~~~\n";
        assert_eq!(markdown(page), [(9, "This is read here.".to_owned())]);
    }

    #[test]
    fn items_and_cells_are_texts_of_their_own() {
        let page = "It has three:\n- the first of\n  its items\n- the second of them\n3. the third of them\n\n\
                    | a head | two | of three words |\n| --- | --- | --- |\n| `a|b` one two | c \\| d e | f |\n";
        assert_eq!(
            texts(page),
            [
                "It has three:",
                "the first of its items",
                "the second of them",
                "the third of them",
                "of three words",
                "Code one two",
                "c / d e",
            ]
        );
    }

    #[test]
    fn comments_are_read_without_the_code_between_them() {
        let code = "//! The head of it.\n\n/// The first of them\n/// goes on here.\nfn first() {}\n\
                    /// The second of them.\n/// ```\n/// let code = here and there;\n/// ```\n// The third of them.\n\
                    let address = \"http://a b c d\";\nuint32 n = 1; // The fourth of them.\n";
        let found: Vec<_> = of_comments(code, RUST).into_iter().map(|s| (s.line, s.text)).collect();
        let expected = [
            (1, "The head of it."),
            (3, "The first of them goes on here."),
            (6, "The second of them."),
            (10, "The third of them."),
            (12, "The fourth of them."),
        ];
        assert_eq!(found, expected.map(|(line, text)| (line, text.to_owned())));
    }

    #[test]
    fn script_keeps_its_first_line_for_itself() {
        let found = of_comments(
            "#!/bin/sh of no interest\n# The head of it.\nrun # it now or never\n",
            SCRIPT,
        );
        assert_eq!(found, [Sentence { line: 2, text: "The head of it.".to_owned() }]);
    }
}
