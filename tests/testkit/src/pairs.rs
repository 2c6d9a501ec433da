//! Rows of a bench: two kinds of work in turn, A B A B …, so that a busy machine slows both. Prints
//! Markdown.

use std::{collections::BTreeMap, fmt::Write as _};

use crate::measure::{Half, Run, Spread, grouped, short};

/// One run for the system calls has this part of the messages, because each call then takes long.
const COUNTED_PART: usize = 8;
/// Calls that are rarer than this a message are not named.
const RARE: f64 = 0.05;

/// The rows that are wanted, and the table so far.
pub struct Pairs {
    pub count: usize,
    only: String,
    begun: bool,
    /// For each row, the system calls of A and of B, a message.
    calls: Vec<(String, Option<String>, Option<String>)>,
    uncounted: Option<String>,
}

impl Pairs {
    /// So many pairs for each row whose name holds this.
    pub fn new(count: usize, only: &str) -> Self {
        Self { count, only: only.into(), begun: false, calls: Vec::new(), uncounted: None }
    }

    /// Whether a row or table of this name is wanted.
    pub fn want(&self, name: &str) -> bool {
        name.contains(&self.only)
    }

    /// Begins a table of its own for the rows that follow.
    pub fn begin(&mut self, title: &str) {
        self.begun = false;
        println!("\n**{title}**");
    }

    /// Runs both, and prints their row. One more run of each counts system calls.
    pub async fn row(
        &mut self,
        name: &str,
        messages: usize,
        a: impl AsyncFn(Run) -> Half,
        b: impl AsyncFn(Run) -> Half,
    ) {
        if !self.want(name) {
            return;
        }
        let run = Run { messages, counts_calls: false };
        // One of each that does not count: connections, caches, the consumer's first look.
        a(run).await;
        b(run).await;
        let mut pairs = Vec::new();
        for _ in 0..self.count {
            pairs.push((a(run).await, b(run).await));
        }
        let run = Run { messages: messages.div_ceil(COUNTED_PART), counts_calls: true };
        let has_proxy = |half: &Half| half.proxy_cpu.is_some();
        let a_calls = if has_proxy(&pairs[0].0) { self.counted(&a(run).await) } else { None };
        let b_calls = if has_proxy(&pairs[0].1) { self.counted(&b(run).await) } else { None };
        self.print(name, &pairs, [&a_calls, &b_calls].map(|calls| calls.as_ref().map(sum)));
        self.calls.push((name.into(), a_calls.map(named), b_calls.map(named)));
    }

    /// System calls of the proxy a message, by name.
    fn counted(&mut self, half: &Half) -> Option<BTreeMap<String, f64>> {
        match half.calls.as_ref()? {
            Ok(calls) => {
                let each =
                    |(name, count): (&String, &u64)| (name.clone(), *count as f64 / half.messages);
                Some(calls.iter().map(each).collect())
            }
            Err(error) => {
                self.uncounted = Some(error.clone());
                None
            }
        }
    }

    fn print(&mut self, name: &str, pairs: &[(Half, Half)], calls: [Option<f64>; 2]) {
        if !self.begun {
            self.begun = true;
            println!(
                "\n| A / B | A msg/s | B msg/s | A/B | spread | A µs/msg | B µs/msg | A proxy µs/msg \
                 | B proxy µs/msg | proxy CPU A/B | spread | A calls/msg | B calls/msg |\n\
                 | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
            );
        }
        let median = |of: &dyn Fn(&(Half, Half)) -> f64| Spread::of(pairs.iter().map(of)).median;
        let proxy = |of: &dyn Fn(&(Half, Half)) -> Option<f64>| {
            let values: Option<Vec<f64>> = pairs.iter().map(of).collect();
            values.map(Spread::of)
        };
        let or_none = |value: Option<String>| value.unwrap_or_else(|| "-".into());
        let shown = |value: Option<Spread>| or_none(value.map(|spread| short(spread.median)));
        let ratio = Spread::of(pairs.iter().map(|(a, b)| a.rate / b.rate));
        let cpu = proxy(&|(a, b)| Some(a.proxy_cpu? / b.proxy_cpu?));
        println!(
            "| {name} | {} | {} | {:.2} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            grouped(median(&|(a, _)| a.rate)),
            grouped(median(&|(_, b)| b.rate)),
            ratio.median,
            ratio.range(),
            short(median(&|(a, _)| a.cpu)),
            short(median(&|(_, b)| b.cpu)),
            shown(proxy(&|(a, _)| a.proxy_cpu)),
            shown(proxy(&|(_, b)| b.proxy_cpu)),
            or_none(cpu.map(|cpu| format!("{:.2}", cpu.median))),
            or_none(cpu.map(|cpu| cpu.range())),
            or_none(calls[0].map(|calls| format!("{calls:.2}"))),
            or_none(calls[1].map(|calls| format!("{calls:.2}"))),
        );
    }

    /// Prints the system calls of all rows by name, or why they are not there.
    pub fn print_calls(&self) {
        if let Some(error) = &self.uncounted {
            println!("\nThe system calls of some rows were not counted: {error}");
        }
        let rows = self.calls.iter().flat_map(|(name, a, b)| {
            let side = |side, calls: &Option<String>| Some((side, name, calls.clone()?));
            [side("A", a), side("B", b)]
        });
        let mut table = String::new();
        for (side, name, calls) in rows.flatten() {
            let _ = writeln!(table, "| {side} of {name} | {calls} |");
        }
        if !table.is_empty() {
            println!("\n**System calls of the proxy, a message**, counted by strace\n");
            print!("| row | calls |\n| --- | --- |\n{table}");
        }
    }
}

fn sum(calls: &BTreeMap<String, f64>) -> f64 {
    calls.values().sum()
}

/// The calls that are not rare, the most frequent first.
fn named(calls: BTreeMap<String, f64>) -> String {
    let mut calls: Vec<(String, f64)> = calls.into_iter().filter(|call| call.1 >= RARE).collect();
    calls.sort_by(|a, b| b.1.total_cmp(&a.1));
    let each: Vec<String> =
        calls.iter().map(|(name, count)| format!("{name} {count:.2}")).collect();
    each.join(", ")
}
