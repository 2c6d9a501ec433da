//! `docs/grpcurl.md`, typed line by line by somebody who has just started `fetch-proxy dev`.

use std::{fs, path::Path, process::Command};

use crate::dev::Dev;

/// A command of the page, and the lines that it shows as its answer.
pub struct Typed {
    pub command: String,
    pub shown: Vec<String>,
}

/// Every `console` block: a command follows `$ `, and goes on while it is open; the rest is shown.
pub fn read(page: &str) -> Vec<Typed> {
    let mut typed: Vec<Typed> = Vec::new();
    let (mut inside, mut open) = (false, false);
    for line in page.lines() {
        if line.starts_with("```") {
            inside = line == "```console";
        } else if !inside {
        } else if let Some(command) = line.strip_prefix("$ ") {
            typed.push(Typed { command: command.to_owned(), shown: Vec::new() });
            open = is_open(command);
        } else if let Some(last) = typed.last_mut() {
            if open {
                last.command += &format!("\n{line}");
                open = is_open(&last.command);
            } else {
                last.shown.push(line.to_owned());
            }
        }
    }
    typed
}

/// Lines of a page on which every command is to be typed that [`read`] passes over, and that may be
/// commands: other blocks than `console`, and a prompt that is not at the start of a line of one.
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

/// As a shell sees it.
fn is_open(command: &str) -> bool {
    command.ends_with('\\') || command.matches('\'').count() % 2 == 1
}

/// What a person would type for what the page says, with what they have seen.
fn translate(command: &str, dev: &Dev, tokens: &[String]) -> String {
    let mut command = command.replace("127.0.0.1:50051", &dev.address().unwrap());
    for (number, token) in (1..).zip(tokens) {
        let name = if number == 1 { "TOKEN".to_owned() } else { format!("TOKEN-{number}") };
        command = command.replace(&format!("\"{name}\""), &format!("\"{token}\""));
    }
    command
}

pub fn type_in(command: &str) -> String {
    let binary = std::env::var("FETCH_PROXY_TEST_GRPCURL").unwrap_or_else(|_| "grpcurl".into());
    let script = format!("grpcurl() {{ '{binary}' \"$@\"; }}\n{command}");
    let output = Command::new("bash").args(["-c", &script]).output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    String::from_utf8(said).unwrap()
}

fn tokens(said: &str) -> Vec<String> {
    let token =
        |line: &str| Some(line.trim().strip_prefix("\"token\": \"")?.split('"').next()?.to_owned());
    said.lines().filter_map(token).collect()
}

/// Whether the lines are there, in this order; `…` is for anything.
pub fn is_shown(shown: &[String], said: &str) -> Result<(), String> {
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
fn no_command_escapes_by_the_way_it_is_written() {
    assert_eq!(escaped("Text, `code`.\n```console\n$ a \\\n    b\n{\n```\nText.\n"), [""; 0]);
    for line in ["```sh", "```", "```console ", "  ```console", "~~~console", "$ a", "    a", "\ta"]
    {
        assert_eq!(escaped(&format!("Text.\n\n{line}\n"))[0], line);
    }
    for line in [" $ a", "$a", "```sh", " ```"] {
        assert_eq!(escaped(&format!("```console\n$ a\n{line}\n"))[0], line);
    }
}

#[tokio::test]
async fn every_line_of_the_grpcurl_page_does_what_the_page_says() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/grpcurl.md");
    let page = fs::read_to_string(page).unwrap();
    assert_eq!(escaped(&page), [""; 0], "nobody types these: write them in a console block");
    let typed = read(&page);
    assert!(typed.len() > 15, "only {} commands are found: the reading is broken", typed.len());
    let mut dev = Dev::start(&[]);
    dev.client().await;
    let mut held = Vec::new();
    for Typed { command, shown } in typed {
        assert!(!shown.is_empty(), "nothing is shown for: {command}");
        let said = type_in(&translate(&command, &dev, &held));
        if let Err(line) = is_shown(&shown, &said) {
            panic!("{command}\nshould say, in its place:\n{line}\nand says:\n{said}");
        }
        let fetched = tokens(&said);
        if !fetched.is_empty() {
            held = fetched;
        }
    }
}
