//! The page of questions names only commands, flags, columns, panels and metrics that there are.

use std::collections::BTreeSet;

use clap::CommandFactory as _;
use fetch_proxy::config::Cli;

use super::{monitoring, pages::read};

const PAGE: &str = "docs/how-to/questions.md";

/// The texts in code of a line, and the panels in quotes.
fn named(line: &str) -> (Vec<String>, Vec<&str>) {
    let code = line.split('`').skip(1).step_by(2).map(|code| code.replace("\\|", "|")).collect();
    let text: Vec<&str> = line.split('"').collect();
    let panels = text.chunks(2).filter(|two| two.len() == 2 && two[0].ends_with("panel "));
    (code, panels.map(|two| two[1]).collect())
}

/// What a command line names that the program does not have.
fn faults(command: &str) -> Vec<String> {
    let cli = Cli::command();
    let mut words = command.split(' ').skip(1);
    let name = words.next().unwrap();
    let Some(found) = cli.get_subcommands().find(|known| known.get_name() == name) else {
        return vec![format!("there is no command {name}")];
    };
    let flags = words.filter_map(|word| word.strip_prefix("--"));
    let known = |flag: &&str| found.get_arguments().any(|known| known.get_long() == Some(flag));
    flags.filter(|flag| !known(flag)).map(|flag| format!("{name} has no --{flag}")).collect()
}

#[test]
fn questions_are_answered_by_what_there_is() {
    let (page, client) = (read(PAGE), read("src/client/operator.rs"));
    let panels = monitoring::panels();
    let rows: Vec<&str> = page.lines().filter(|line| line.starts_with("| ")).collect();
    let questions = rows.iter().take_while(|row| !row.contains("limit | query")).skip(2);
    assert_eq!(questions.filter(|row| row.contains("? |")).count(), 14);
    let (mut commands, mut queries, mut wrong) = (0, 0, Vec::new());
    for row in page.lines() {
        let (code, shown) = named(row);
        wrong.extend(
            shown.iter().filter(|panel| !panels.contains(**panel)).map(ToString::to_string),
        );
        for code in code {
            if code.starts_with("fetch-proxy ") {
                commands += 1;
                wrong.extend(faults(&code));
            } else if code.contains("fetchproxy_") || code.contains("process_") {
                queries += 1;
                wrong.extend(monitoring::faults(&code));
            }
        }
        let columns = row.split("column").skip(1);
        let columns = columns.flat_map(|text| text.split(['`', '|', ';', ','])).take(1);
        for column in columns.flat_map(|text| text.trim_start_matches('s').split(" and ")) {
            let column = column.trim();
            if !client.contains(&format!("\"{column}\"")) {
                wrong.push(format!("no list has the column {column}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(commands > 8 && queries > 12, "the reading is broken: {commands}, {queries}");
}

#[test]
fn wrong_names_in_an_answer_are_found() {
    assert_eq!(faults("fetch-proxy leases ORDERS worker --older-than 10m"), [""; 0]);
    assert_eq!(faults("fetch-proxy leases --elder-than 10m"), ["leases has no --elder-than"]);
    assert_eq!(faults("fetch-proxy lease"), ["there is no command lease"]);
    let (code, panels) = named("| a | `b \\| c`, panel \"D, e\" and \"f\" |");
    assert_eq!((code, panels), (vec!["b | c".to_owned()], vec!["D, e"]));
    assert_eq!(
        monitoring::panels().intersection(&BTreeSet::from(["Overview".to_owned()])).count(),
        1
    );
}
