//! Pages of the docs that a test types line by line, as a person would.
//!
//! A `console` block of a page has commands and answers. A command follows `$ `, and continues while
//! a quote, a backslash or a here-document is open. The other lines are what the command answers.
//! `…` in an answer stands for any text.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::{fs::symlink, process::CommandExt as _},
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::Duration,
};

use serde_json::Value;

use crate::dev::Dev;

const PROGRAM: &str = env!("CARGO_BIN_EXE_fetch-proxy");
/// The terminal prints this when a command has ended.
const ENDED: &str = "[the command has ended]";
/// No command of a page takes longer, on a busy machine as well.
const LONGEST: Duration = Duration::from_secs(60);

/// A command of a page, and the lines that the page shows as its answer.
pub struct Typed {
    pub command: String,
    pub shown: Vec<String>,
}

impl Typed {
    /// Panics unless the answer has the lines that the page shows, in their order. A command for which
    /// the page shows nothing must answer nothing.
    pub fn compare(&self, said: &str) {
        let Self { command, shown } = self;
        assert!(
            !shown.is_empty() || said.is_empty(),
            "{command}\nshould be silent, and says:\n{said}"
        );
        if let Err(line) = is_shown(shown, said) {
            panic!("{command}\nshould say, in its place:\n{line}\nand says:\n{said}");
        }
    }
}

/// Reads a page from the root of the project.
pub fn load(page: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(page)).unwrap()
}

/// All commands of a page on which no command may escape the test.
pub fn read_all(page: &str) -> Vec<Typed> {
    let page = load(page);
    assert_eq!(escaped(&page), [""; 0], "nobody types these: write them in a console block");
    let typed = read(&page);
    assert!(typed.len() > 10, "only {} commands are found: the reading is broken", typed.len());
    typed
}

/// The commands of all `console` blocks.
pub fn read(page: &str) -> Vec<Typed> {
    let mut typed: Vec<Typed> = Vec::new();
    let (mut inside, mut open) = (false, false);
    for line in page.lines() {
        if line.starts_with("```") {
            inside = line == "```console";
        } else if !inside {
        } else if let Some(last) = typed.last_mut().filter(|_| open) {
            last.command += &format!("\n{line}");
            open = is_open(&last.command);
        } else if let Some(command) = line.strip_prefix("$ ") {
            typed.push(Typed { command: command.to_owned(), shown: Vec::new() });
            open = is_open(command);
        } else if let Some(last) = typed.last_mut() {
            last.shown.push(line.to_owned());
        }
    }
    typed
}

/// Lines that may be commands and that [`read`] passes over: blocks other than `console`, and a
/// prompt that is not at the start of a line.
fn escaped(page: &str) -> Vec<&str> {
    let mut inside = false;
    let escapes = |line: &&str| {
        let text = line.trim_start();
        let is_fence = text.starts_with("```") || text.starts_with("~~~");
        inside ^= is_fence;
        let is_prompt = text.starts_with('$') && !line.starts_with("$ ");
        match (is_fence, inside) {
            (true, opened) => *line != if opened { "```console" } else { "```" },
            (false, true) => is_prompt,
            (false, false) => {
                text.starts_with('$') || line.starts_with("    ") || line.starts_with('\t')
            }
        }
    };
    page.lines().filter(escapes).collect()
}

/// Whether a shell waits for another line of the command.
fn is_open(command: &str) -> bool {
    if let Some((_, rest)) = command.split_once("<<'") {
        let end = rest.split('\'').next().unwrap();
        return !command.lines().skip(1).any(|line| line == end);
    }
    command.ends_with('\\') || command.matches('\'').count() % 2 == 1
}

/// The command with the tokens that a person has seen: `TOKEN` is the first, `TOKEN-2` the second.
pub fn paste(command: &str, tokens: &[String]) -> String {
    let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
    let mut pasted = String::new();
    let mut rest = command;
    while let Some(at) = rest.find(is_name) {
        let (before, name) = rest.split_at(at);
        let (name, after) = name.split_at(name.find(|c| !is_name(c)).unwrap_or(name.len()));
        let number = match name.strip_prefix("TOKEN") {
            Some("") => Some(1),
            Some(number) => number.strip_prefix('-').and_then(|number| number.parse().ok()),
            None => None,
        };
        let seen = |number: usize| &**tokens.get(number - 1).expect("nobody has seen that token");
        pasted += before;
        pasted += number.map_or(name, seen);
        rest = after;
    }
    pasted + rest
}

/// The tokens of an answer to a Fetch: in text, in JSON, or as grpcurl prints it.
pub fn tokens(said: &str) -> Vec<String> {
    let answer: Option<Value> = serde_json::from_str(said).ok();
    if let Some(messages) = answer.as_ref().and_then(|answer| answer["messages"].as_array()) {
        return messages.iter().filter_map(|m| Some(m["token"].as_str()?.to_owned())).collect();
    }
    let lines: Vec<&str> = said.lines().collect();
    let announced = lines.windows(2).filter(|two| two[0].ends_with("with this token:"));
    announced.map(|two| two[1].to_owned()).collect()
}

/// Types all commands of a page. `TOKEN` is the first token of the last Fetch. `names` are names of
/// the page, each with the name for the same thing here.
pub fn walk(page: &str, terminal: &mut Terminal, names: &[(&str, &str)]) {
    let mut held = Vec::new();
    for typed in read_all(page) {
        let here = |text: String, (name, here): &(&str, &str)| text.replace(name, here);
        let there = |text: String, (name, here): &(&str, &str)| text.replace(here, name);
        let command = names.iter().fold(typed.command.clone(), here);
        let said = terminal.type_in(&paste(&command, &held));
        let said = names.iter().fold(said, there);
        typed.compare(&said);
        let seen = tokens(&said);
        if !seen.is_empty() {
            held = seen;
        }
    }
}

/// A shell. Its variables, its folder and its background jobs stay from command to command.
pub struct Terminal {
    shell: Child,
    said: mpsc::Receiver<String>,
    _programs: tempfile::TempDir,
}

impl Terminal {
    /// Opens a terminal in the folder of the project, where `fetch-proxy` and `grpcurl` are commands.
    pub fn open() -> Self {
        let programs = tempfile::tempdir().unwrap();
        symlink(PROGRAM, programs.path().join("fetch-proxy")).unwrap();
        if let Some(grpcurl) = std::env::var_os("FETCH_PROXY_TEST_GRPCURL") {
            symlink(grpcurl, programs.path().join("grpcurl")).unwrap();
        }
        let path = format!("{}:{}", programs.path().display(), std::env::var("PATH").unwrap());
        let mut shell = Command::new("bash")
            .args(["--norc", "-s"])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .env("PATH", path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Its background jobs end with it.
            .process_group(0)
            .spawn()
            .unwrap();
        let lines = BufReader::new(shell.stdout.take().unwrap()).lines();
        let (sender, said) = mpsc::channel();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        writeln!(shell.stdin.as_mut().unwrap(), "exec 2>&1").unwrap();
        Self { shell, said, _programs: programs }
    }

    /// Types a command, waits for its end, and returns what it said.
    pub fn type_in(&mut self, command: &str) -> String {
        let input = self.shell.stdin.as_mut().unwrap();
        write!(input, "{{\n{command}\n}} < /dev/null\necho '{ENDED}'\n").unwrap();
        let mut said = String::new();
        loop {
            let Ok(line) = self.said.recv_timeout(LONGEST) else {
                panic!("no end of {command}\nwhich said:\n{said}");
            };
            let ended = line.strip_suffix(ENDED);
            said += ended.unwrap_or(&line);
            if ended.is_some() {
                return said;
            }
            said.push('\n');
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let group = format!("-{}", self.shell.id());
        let _ = Command::new("kill").args(["-s", "KILL", "--", &group]).status();
        let _ = self.shell.wait();
    }
}

/// Whether the lines are there, in this order.
///
/// # Errors
/// The first line that is not there.
fn is_shown(shown: &[String], said: &str) -> Result<(), String> {
    let mut lines = said.lines();
    for line in shown {
        let parts: Vec<&str> = line.trim().split('…').filter(|part| !part.is_empty()).collect();
        let fits = |said: &str| parts.iter().all(|part| said.contains(part));
        if !parts.is_empty() && !lines.any(fits) {
            return Err(line.clone());
        }
    }
    Ok(())
}

#[test]
fn every_style_of_command_is_read() {
    assert_eq!(escaped("Text, `code`.\n```console\n$ a \\\n    b\n{\n```\nText.\n"), [""; 0]);
    for line in ["```sh", "```", "```console ", "  ```console", "~~~console", "$ a", "    a", "\ta"]
    {
        assert_eq!(escaped(&format!("Text.\n\n{line}\n"))[0], line);
    }
    for line in [" $ a", "$a", "```sh", " ```"] {
        assert_eq!(escaped(&format!("```console\n$ a\n{line}\n"))[0], line);
    }
}

#[test]
fn command_has_all_its_lines() {
    let page = "```console\n$ a \\\n  b\nsaid\n$ cat <<'END'\n$ it's text\nEND\n$ c 'd\ne'\n```\n";
    let commands: Vec<_> = read(page).into_iter().map(|typed| typed.command).collect();
    assert_eq!(commands, ["a \\\n  b", "cat <<'END'\n$ it's text\nEND", "c 'd\ne'"]);
}

#[test]
fn token_replaces_its_name_on_a_page() {
    let seen = ["a".to_owned(), "b".to_owned()];
    let typed = r#"MY_TOKEN=1 x TOKEN "TOKEN-2" TOKENS"#;
    assert_eq!(paste(typed, &seen), r#"MY_TOKEN=1 x a "b" TOKENS"#);
}

#[test]
fn terminal_keeps_variables_and_shows_output() {
    let mut terminal = Terminal::open();
    assert_eq!(terminal.type_in("x=1"), "");
    assert_eq!(terminal.type_in("echo $x; printf 2; echo 3 >&2; cat"), "1\n23\n");
    assert_eq!(terminal.type_in("printf no-line-end"), "no-line-end");
}

#[tokio::test]
async fn every_line_of_the_page_about_commands_does_what_the_page_says() {
    let mut dev = Dev::start(&[]);
    dev.client().await;
    let mut terminal = Terminal::open();
    terminal.type_in(&format!("export FETCH_PROXY_ADDR={}", dev.address().unwrap()));
    walk("docs/how-to/run-a-command.md", &mut terminal, &[]);
}

#[tokio::test]
async fn every_line_of_the_grpcurl_page_does_what_the_page_says() {
    let mut dev = Dev::start(&[]);
    dev.client().await;
    let address = dev.address().unwrap();
    walk("docs/how-to/by-hand.md", &mut Terminal::open(), &[("127.0.0.1:50051", &address)]);
}
