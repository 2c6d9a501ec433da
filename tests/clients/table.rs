//! The output: each cell when it is known, and a table of languages and scenarios at the end.

use std::{collections::BTreeMap, time::Duration};

use testkit::examples::{
    language::{Language, last_lines},
    reports::Tally,
    scenario::Scenario,
};

/// With fewer languages at once, little is shown of how they get along.
const CROWD: usize = 4;
/// So many lines of each reason stand below the table.
const LINES_AT_END: usize = 25;

#[derive(Clone)]
pub enum Fate {
    Well { took: Duration, tally: Tally },
    Wrong(String),
    Skipped(String),
}

pub struct Cell {
    pub language: String,
    pub scenario: String,
    pub fate: Fate,
}

pub struct Table {
    languages: Vec<String>,
    scenarios: Vec<String>,
    cells: BTreeMap<(String, String), Fate>,
    /// Scenarios that were not tested as they should be.
    lacking: Vec<String>,
    /// Each failure, and its reason.
    wrong: Vec<(String, String)>,
}

impl Table {
    pub fn new(languages: &[Language], scenarios: &[Scenario]) -> Self {
        let languages = languages.iter().map(|language| language.name.clone()).collect();
        let scenarios = scenarios.iter().map(|scenario| scenario.name.clone()).collect();
        let (cells, lacking, wrong) = (BTreeMap::new(), Vec::new(), Vec::new());
        Self { languages, scenarios, cells, lacking, wrong }
    }

    pub fn note(&mut self, cell: Cell) {
        let Cell { language, scenario, fate } = cell;
        match &fate {
            Fate::Well { took, tally } => {
                let (took, more) = (took.as_secs_f64(), noteworthy(tally, &language));
                println!("{language:<12}{scenario:<28}ok {took:.1} s{more}");
            }
            Fate::Skipped(why) => println!("{language:<12}{scenario:<28}skipped: {why}"),
            Fate::Wrong(wrong) => {
                println!("{language:<12}{scenario:<28}FAILED\n{}", indented(wrong));
                self.wrong.push((format!("{language} {scenario}"), wrong.clone()));
            }
        }
        self.cells.insert((language, scenario), fate);
    }

    pub fn lacks(&mut self, language: &str, what: String) {
        println!("{language:<12}SKIPPED: {what}");
        self.lacking.push(format!("{language}: {what}"));
    }

    /// So many languages act in a scenario that is for all of them.
    pub fn crowd(&mut self, scenario: &str, languages: usize) {
        if languages < CROWD {
            let few = format!("{scenario}: {languages} languages at once, {CROWD} are the least");
            println!("{few}");
            self.lacking.push(few);
        }
    }

    /// Something outside the scenarios failed.
    pub fn wrong(&mut self, what: &str, why: &str) {
        println!("{what:<12}FAILED\n{}", indented(why));
        self.wrong.push((what.to_owned(), why.to_owned()));
    }

    pub fn is_well(&self) -> bool {
        self.wrong.is_empty() && self.cells.values().any(|fate| matches!(fate, Fate::Well { .. }))
    }

    /// Language by scenario, in seconds.
    pub fn print(&self) {
        print!("\n{:<28}", "");
        self.languages.iter().for_each(|language| print!("{language:>12}"));
        println!();
        for scenario in &self.scenarios {
            print!("{scenario:<28}");
            for language in &self.languages {
                let cell = match self.cells.get(&(language.clone(), scenario.clone())) {
                    None => "-".to_owned(),
                    Some(Fate::Skipped(_)) => "skipped".to_owned(),
                    Some(Fate::Wrong(_)) => "FAILED".to_owned(),
                    Some(Fate::Well { took, .. }) => format!("ok {:.1} s", took.as_secs_f64()),
                };
                print!("{cell:>12}");
            }
            println!();
        }
        for lacking in &self.lacking {
            println!("\nNOT TESTED, {lacking}");
        }
        // Once more at the end, because this part of a long output is read first.
        for (what, why) in &self.wrong {
            println!("\nFAILED: {what}\n{}", indented(&last_lines(why, LINES_AT_END)));
        }
        let names: Vec<_> = self.wrong.iter().map(|(what, _)| what.as_str()).collect();
        let wrong = names.join(", ");
        println!(
            "\n{}",
            if self.wrong.is_empty() { "all is well".into() } else { format!("FAILED: {wrong}") }
        );
    }
}

fn noteworthy(tally: &Tally, language: &str) -> String {
    let twice = (tally.twice > 0).then(|| format!(", {} repeated", tally.twice));
    let share = tally.acked.get(language).filter(|_| tally.acked.len() > 1);
    twice.unwrap_or_default() + &share.map_or(String::new(), |share| format!(", {share} acked"))
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("    {line}\n")).collect()
}
