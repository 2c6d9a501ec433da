//! `make test-clients`: the worker of every language, through every scenario of
//! `examples/conformance.json`, against a real proxy and a real nats-server; and a table of it.
//!
//! ```text
//! cargo test --test clients -- python rust    these languages only
//! cargo test --test clients -- nak            this scenario only, with Fetch and with Consume
//! cargo test --test clients -- consume        this loop only
//! ```
//! A language whose toolchain is missing is skipped, and that is said aloud. Anything else that is
//! not as promised fails the run.

#![allow(clippy::disallowed_methods, reason = "the workers live in real time")]

mod door;
mod play;
mod readme;
mod server;
mod table;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    sync::Arc,
    time::{Duration, Instant},
};

use play::Play;
use table::{Cell, Fate, Table};
use testkit::{
    examples::{
        language::{self, Built, Language},
        scenario::{Scenario, Suite},
    },
    nats_server::{self, NatsServer},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::Semaphore,
    task::JoinSet,
};

/// Scenarios that are tried at a time, each in one language: most of a scenario is waiting.
const AT_A_TIME: usize = 6;
/// More than a worker accepts in one answer.
const NATS: &str = "max_payload: 32MB";
/// For all scenarios, builds not counted.
const LONGEST_RUN: Duration = Duration::from_secs(1500);

fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut told_to_stop = signal(SignalKind::terminate()).unwrap();
        // Leaving drops what is under way, and with it every process that was started.
        tokio::select! {
            code = run() => code,
            _ = told_to_stop.recv() => ExitCode::FAILURE,
            _ = tokio::signal::ctrl_c() => ExitCode::FAILURE,
        }
    })
}

async fn run() -> ExitCode {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let suite = match Suite::read(&root.join("examples")) {
        Ok(suite) => suite,
        Err(wrong) => {
            eprintln!("{wrong}");
            return ExitCode::FAILURE;
        }
    };
    let wanted: Vec<String> = env::args().skip(1).collect();
    let all = language::all(root);
    let languages = choose(all, &wanted, |language, word| language.name == word);
    let scenarios = choose(suite.scenarios, &wanted, Scenario::is_meant);
    let mut table = Table::new(&languages, &scenarios);
    let built = build(languages, &mut table).await;
    if let Some(python) = built.iter().find(|language| language.name == "python") {
        match tokio::spawn(readme::follow(python.clone())).await {
            Ok(Ok(())) => println!("README's worker ok"),
            Ok(Err(why)) => table.wrong("README's worker", &why),
            Err(panic) => table.wrong("README's worker", &panic.to_string()),
        }
    }
    let keys = keys();
    let jobs = Jobs { scenarios, skips: suite.skips, keys: keys.path().to_owned() };
    let acted = tokio::time::timeout(LONGEST_RUN, act(jobs, built, &mut table)).await;
    if acted.is_err() {
        println!("\nended after {LONGEST_RUN:?}");
    }
    table.print();
    if acted.is_ok() && table.is_well() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Those that a word means, or all if no word means any.
fn choose<T>(all: Vec<T>, wanted: &[String], is_meant: impl Fn(&T, &str) -> bool) -> Vec<T> {
    let is_wanted = |one: &T| wanted.iter().any(|word| is_meant(one, word));
    if all.iter().any(is_wanted) { all.into_iter().filter(is_wanted).collect() } else { all }
}

/// One after the other, for each takes the whole machine. The tests of a client package, too.
async fn build(languages: Vec<Language>, table: &mut Table) -> Vec<Language> {
    let mut ready = Vec::new();
    for language in languages {
        let began = Instant::now();
        let built = language.build().await;
        let mut is_ready = note(&language, "built", began, built, table);
        let began = Instant::now();
        if let Some(tested) = language.test_package().await {
            is_ready &= note(&language, "tested the package", began, tested, table);
        }
        if is_ready {
            ready.push(language);
        }
    }
    ready
}

/// Whether it is done. If not, the table has the reason.
fn note(language: &Language, what: &str, began: Instant, fate: Built, table: &mut Table) -> bool {
    match fate {
        Built::Ready => {
            let took = began.elapsed().as_secs_f64();
            println!("{}: {what} in {took:.1} s", language.name);
            return true;
        }
        Built::Lacking(what) => table.lacks(&language.name, what),
        Built::Failed(why) => table.wrong(&format!("{}, not {what}", language.name), &why),
    }
    false
}

struct Jobs {
    scenarios: Vec<Scenario>,
    skips: std::collections::BTreeMap<String, std::collections::BTreeMap<String, String>>,
    keys: PathBuf,
}

/// Each scenario in each language, some at a time; then all languages together. Languages take turns, because some need
/// much more of the machine than others.
async fn act(jobs: Jobs, languages: Vec<Language>, table: &mut Table) {
    let (jobs, turns) = (Arc::new(jobs), Arc::new(Semaphore::new(AT_A_TIME)));
    let mut cells = JoinSet::new();
    for scenario in jobs.scenarios.iter().filter(|scenario| !scenario.together) {
        for language in &languages {
            let (jobs, turns) = (jobs.clone(), turns.clone());
            let (scenario, language) = (scenario.clone(), language.clone());
            cells.spawn(async move {
                let _turn = turns.acquire().await;
                alone(&jobs, &scenario, language).await
            });
        }
    }
    while let Some(cell) = cells.join_next().await {
        table.note(cell.unwrap());
    }
    for scenario in jobs.scenarios.iter().filter(|scenario| scenario.together) {
        together(&jobs, scenario, &languages, table).await;
    }
}

/// All languages that do not skip it; each must have its share.
async fn together(jobs: &Jobs, scenario: &Scenario, languages: &[Language], table: &mut Table) {
    let skips = |one: &&Language| jobs.reason_to_skip(one, scenario).is_none();
    let present: Vec<_> = languages.iter().filter(skips).cloned().collect();
    table.crowd(&scenario.name, present.len());
    let fate = match present.is_empty() {
        true => Fate::Skipped("nobody is here".to_owned()),
        false => one(scenario, present, jobs.keys.clone()).await,
    };
    for language in languages {
        let fate = match (jobs.reason_to_skip(language, scenario), &fate) {
            (Some(why), _) => Fate::Skipped(why.clone()),
            (None, Fate::Well { tally, .. }) if !tally.acked.contains_key(&language.name) => {
                Fate::Wrong("acked nothing".to_owned())
            }
            (None, fate) => fate.clone(),
        };
        let (language, scenario) = (language.name.clone(), scenario.name.clone());
        table.note(Cell { language, scenario, fate });
    }
}

async fn alone(jobs: &Jobs, scenario: &Scenario, language: Language) -> Cell {
    let name = language.name.clone();
    let fate = match jobs.reason_to_skip(&language, scenario) {
        Some(why) => Fate::Skipped(why.clone()),
        None => one(scenario, vec![language], jobs.keys.clone()).await,
    };
    Cell { language: name, scenario: scenario.name.clone(), fate }
}

impl Jobs {
    fn reason_to_skip(&self, language: &Language, scenario: &Scenario) -> Option<&String> {
        let skips = self.skips.get(&language.name)?;
        skips.get(&scenario.name).or_else(|| skips.get(scenario.by.name()))
    }
}

/// A panic is a failure like another, and its processes end, too.
async fn one(scenario: &Scenario, languages: Vec<Language>, keys: PathBuf) -> Fate {
    let (scenario, began) = (scenario.clone(), Instant::now());
    let acting = tokio::spawn(async move {
        let mut nats = NatsServer::start_with(nats_server::binary(), Some(NATS.to_owned()));
        Play::set(&scenario, &languages, &keys, &mut nats).await.act().await
    });
    match acting.await {
        Ok(Ok(tally)) => Fate::Well { took: began.elapsed(), tally },
        Ok(Err(wrong)) => Fate::Wrong(wrong),
        Err(panic) => Fate::Wrong(panic.to_string()),
    }
}

/// A file with a key for tokens, so that a proxy knows those of the one before it.
fn keys() -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    let made = Command::new(env!("CARGO_BIN_EXE_fetch-proxy")).arg("keygen").output().unwrap();
    fs::write(file.path(), made.stdout).unwrap();
    file
}
