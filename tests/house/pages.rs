//! Pages that are what the code says: the reference of errors and of flags are rendered from it, and
//! the how-to for workers knows every reason.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::Path};

use clap::{Arg, ArgAction, Command, CommandFactory as _};
use fetch_proxy::{
    access::Unauthenticated,
    config::Cli,
    metrics::{FAMILIES, FamilyKind},
    pb::FILE_DESCRIPTOR_SET,
    reason::{DOMAIN, REASON_TRAILER, Reason},
};
use prost::Message as _;
use prost_types::{EnumValueDescriptorProto, FileDescriptorSet};

/// The heading of a table in the how-to for workers, and the reasons of each of its rows.
type Advice = BTreeMap<String, Vec<String>>;

pub(super) fn read(page: &str) -> String {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(page);
    fs::read_to_string(&file).unwrap_or_else(|error| panic!("{page}: {error}"))
}

/// A page is what a test has rendered, which writes it if `UPDATE_DOCS` is set.
pub(super) fn assert_rendered(page: &str, rendered: &str) {
    if std::env::var_os("UPDATE_DOCS").is_some() {
        // In one step, because other tests read the page meanwhile.
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(page);
        let new = file.with_extension("new");
        fs::write(&new, rendered).unwrap();
        fs::rename(new, file).unwrap();
    }
    assert!(
        read(page) == rendered,
        "{page} is not what the code says: UPDATE_DOCS=1 cargo test --test house writes it"
    );
}

#[test]
fn page_of_errors_is_what_the_code_says() {
    let mut page = format!(
        "# Errors\n\n\
         Every status of the service carries a `google.rpc.ErrorInfo` with domain `{DOMAIN}` and one of\n\
         these reasons. The trailer `{REASON_TRAILER}` has the same reason. In a `Settle`, each settlement that\n\
         failed has its reason in its `SettleError`.\n\n\
         A reason is a promise about what has and has not happened. This page is normative for these\n\
         promises. [Write a worker](../how-to/write-a-worker.md#what-to-do-about-a-reason) says what to do. A bare\n\
         `UNAVAILABLE`, without a reason, comes from the transport and promises nothing.\n\n\
         A test renders this page from the code: `UPDATE_DOCS=1 cargo test --test house`.\n\n\
         | reason | code | the promise | repeat after |\n| --- | --- | --- | --- |\n",
    );
    for reason in Reason::ALL {
        let retry = reason.retry_after().map_or("-".to_owned(), |delay| format!("{delay:?}"));
        let (name, code, promise) = (reason.name(), reason.code(), reason.promise());
        writeln!(page, "| `{name}` | {code:?} | {promise} | {retry} |").unwrap();
    }
    page += "\n## Why an answer has no messages\n\n\
             A Fetch without messages is OK, and has one of these values as its `empty_reason`. If a Fetch settles\n\
             first and then fails, it is OK too: a status would hide the results. The `error` of its answer has\n\
             the reason, and says of the Fetch what a status would say. The results say what is settled.\n\n\
             | `empty_reason` | meaning |\n| --- | --- |\n";
    for (name, meaning) in documented("EmptyReason").into_iter().skip(1) {
        writeln!(page, "| `{name}` | {meaning} |").unwrap();
    }
    page += "\n## Why a credential is refused\n\n\
             The metadata `why` of `UNAUTHENTICATED` has one of these values. Claims of a token are judged only\n\
             after its signature. A missing or wrong claim is `malformed`, and the message names it.\n\n\
             | why | meaning |\n| --- | --- |\n";
    for why in Unauthenticated::ALL {
        writeln!(page, "| `{}` | {} |", why.name(), why.message()).unwrap();
    }
    assert_rendered("docs/reference/errors.md", &page);
}

/// The values of an enum of the contract, each with its comment.
fn documented(kind: &str) -> Vec<(String, String)> {
    let files = FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).unwrap().file;
    let file = files.into_iter().find(|file| file.name().ends_with("/fetch.proto")).unwrap();
    let place = file.enum_type.iter().position(|known| known.name() == kind).unwrap();
    let locations = file.source_code_info.as_ref().unwrap();
    let value = |(number, value): (usize, &EnumValueDescriptorProto)| {
        // Field 5 of a file has its enums, and field 2 of an enum has its values.
        let path = [5, place, 2, number].map(|part| i32::try_from(part).unwrap());
        let found = locations.location.iter().find(|location| location.path == path).unwrap();
        let words: Vec<_> = found.leading_comments().split_whitespace().collect();
        (value.name().to_owned(), words.join(" "))
    };
    file.enum_type[place].value.iter().enumerate().map(value).collect()
}

#[test]
fn page_of_metrics_is_what_the_code_says() {
    let mut page = "# Metrics\n\n\
         `GET /metrics` on the ops port shows these families, in the text format of Prometheus or as\n\
         OpenMetrics. `--metrics off` ends it. [Operate](../how-to/operate.md#metrics) says what to look at first.\n\n\
         - A counter only grows, and starts at 0 with the process. A gauge is what it is at the scrape.\n\
         - A histogram *h* has the series *h*`_bucket`, *h*`_sum` and *h*`_count`.\n\
         - Times are in seconds, and sizes in bytes.\n\n\
         A test renders this page from the code: `UPDATE_DOCS=1 cargo test --test house`.\n"
        .to_owned();
    let mut group = "";
    for family in FAMILIES {
        if group != family.group {
            group = family.group;
            write!(page, "\n## {group}\n\n| name | type | labels | meaning |\n").unwrap();
            page += "| --- | --- | --- | --- |\n";
        }
        let kind = match family.kind {
            FamilyKind::Counter => "counter",
            FamilyKind::Gauge => "gauge",
            FamilyKind::Histogram(_) => "histogram",
        };
        let labels: Vec<_> = family.labels.iter().map(|label| format!("`{label}`")).collect();
        let (name, labels) = (family.shown(), labels.join(", "));
        writeln!(page, "| `{name}` | {kind} | {labels} | {} |", family.help).unwrap();
    }
    page += "\n## Bounds of the histograms\n\n";
    let mut shown: Vec<&[f64]> = Vec::new();
    for family in FAMILIES {
        if let FamilyKind::Histogram(bounds) = family.kind
            && !shown.contains(&bounds)
        {
            shown.push(bounds);
            let same = FAMILIES.iter().filter(|other| other.kind == family.kind);
            let names: Vec<_> = same.map(|other| format!("`{}`", other.name)).collect();
            let bounds: Vec<_> = bounds.iter().map(f64::to_string).collect();
            writeln!(page, "- {}: {}", bounds.join(", "), names.join(", ")).unwrap();
        }
    }
    assert_rendered("docs/reference/metrics.md", &page);
}

#[test]
fn page_of_flags_is_what_the_code_says() {
    let cli = Cli::command();
    let mut page = "# Flags\n\n\
         This page has every command of `fetch-proxy`, with its arguments and flags. Each flag with a\n\
         variable can be set in the environment instead. The flag takes precedence. An argument in `[ ]` may be left out.\n\n\
         - A TIME is a number with a unit, such as `500ms`, `10s`, `5m` or `1h`.\n\
         - An ADDR is `IP:PORT`, `NAME:PORT`, or `:PORT`.\n\
         - `NATS_PASSWORD` and `NATS_TOKEN` are read from the environment only.\n\n\
         A test renders this page from the code: `UPDATE_DOCS=1 cargo test --test house`.\n"
        .to_owned();
    let mut tables = Vec::new();
    for command in cli.get_subcommands().filter(|command| !command.is_hide_set()) {
        page += &of_command(command, "", &mut tables);
        for inner in command.get_subcommands() {
            page += &of_command(inner, &format!("{} ", command.get_name()), &mut tables);
        }
    }
    for section in page.split("\n## ") {
        let mut rows: Vec<_> = section.lines().filter(|line| line.starts_with("| `")).collect();
        rows.sort_unstable();
        assert!(rows.windows(2).all(|pair| pair[0] != pair[1]), "a row stands twice in {section}");
    }
    assert_rendered("docs/reference/flags.md", &page);
}

/// The section of a command. `outer` is the command that it belongs to, with a space. `tables` are
/// those of the sections before, with the names of their commands: a table stands on the page once.
fn of_command(command: &Command, outer: &str, tables: &mut Vec<(String, String)>) -> String {
    let command_name = format!("{outer}{}", command.get_name());
    let mut page = format!("\n## `fetch-proxy {command_name}`\n\n");
    let about = command.get_long_about().or(command.get_about());
    page += &sentence(&one_paragraph(&about.unwrap().to_string()));
    page.push('\n');
    let shown = |argument: &&Arg| !argument.is_hide_set() && argument.get_id() != "help";
    let (placed, named): (Vec<_>, Vec<_>) =
        command.get_arguments().filter(shown).partition(|argument| argument.is_positional());
    if !placed.is_empty() {
        page += "\n| argument | meaning |\n| --- | --- |\n";
    }
    for argument in placed {
        let name = argument.get_value_names().unwrap()[0].as_str();
        let several = argument.get_num_args().is_some_and(|number| number.max_values() > 1);
        let name = format!("{name}{}", if several { " …" } else { "" });
        let name = if argument.is_required_set() { name } else { format!("[{name}]") };
        writeln!(page, "| `{name}` | {} |", meaning(argument).0).unwrap();
    }
    // As `--help` shows them: first the flags without a heading, then each heading once.
    let mut headings: Vec<Option<&str>> = Vec::new();
    for heading in named.iter().map(|argument| argument.get_help_heading()) {
        if !headings.contains(&heading) {
            headings.push(heading);
        }
    }
    headings.sort_by_key(Option::is_some);
    for heading in headings {
        let of_heading = named.iter().filter(|argument| argument.get_help_heading() == heading);
        let rows: String = of_heading.map(|argument| row(argument)).collect();
        if let Some(heading) = heading {
            write!(page, "\n### `{command_name}`: {heading}\n").unwrap();
        }
        if let Some((_, other)) = tables.iter().find(|(known, _)| *known == rows) {
            let place = other.replace(' ', "-");
            write!(page, "\nThe flags are those of [`{other}`](#fetch-proxy-{place}).\n").unwrap();
            continue;
        }
        page += "\n| flag | variable | default | meaning |\n| --- | --- | --- | --- |\n";
        page += &rows;
        tables.push((rows, command_name.clone()));
    }
    page
}

fn row(argument: &Arg) -> String {
    let code = |text: &str| format!("`{text}`");
    let short = argument.get_short().map(|short| format!("`-{short}`, ")).unwrap_or_default();
    let takes_value = matches!(argument.get_action(), ArgAction::Set | ArgAction::Append);
    let value = argument.get_value_names().filter(|_| takes_value);
    let value = value.map(|names| format!(" {}", names[0])).unwrap_or_default();
    let variable = argument.get_env().and_then(|name| name.to_str()).map(code);
    let (meaning, stated) = meaning(argument);
    let given = argument.get_default_values().first().and_then(|value| value.to_str());
    let given = given.filter(|value| takes_value && !value.is_empty());
    let default = stated.or(given.map(|value| code(&size(argument, value))));
    let (variable, default) = (variable.unwrap_or_default(), default.unwrap_or_default());
    let flag = argument.get_long().unwrap();
    format!("| {short}`--{flag}{value}` | {variable} | {default} | {meaning} |\n")
}

/// Bytes are easier to read in MiB.
fn size(argument: &Arg, value: &str) -> String {
    let bytes = argument.get_value_names().is_some_and(|names| names[0] == "BYTES");
    match value.parse::<u64>() {
        Ok(number) if bytes && number % (1 << 20) == 0 => {
            format!("{number} ({} MiB)", number >> 20)
        }
        _ => value.to_owned(),
    }
}

/// The help of an argument, and the default that its text states.
fn meaning(argument: &Arg) -> (String, Option<String>) {
    let help = argument.get_long_help().or(argument.get_help());
    let help = one_paragraph(&help.map(ToString::to_string).unwrap_or_default());
    let (text, default) = match help.split_once(" [default: ") {
        Some((text, rest)) => {
            let (default, rest) = rest.split_once(']').unwrap();
            (sentence(text) + rest, Some(default.to_owned()))
        }
        None => (help, None),
    };
    let mut meaning = sentence(&text.replace('|', "\\|"));
    let takes_value = matches!(argument.get_action(), ArgAction::Set | ArgAction::Append);
    for value in argument.get_possible_values().iter().filter(|_| takes_value) {
        let help = value.get_help().map(ToString::to_string).unwrap_or_default();
        if !help.is_empty() {
            write!(meaning, " `{}`: {}", value.get_name(), sentence(&lower(&help))).unwrap();
        }
    }
    (meaning, default)
}

/// A summary and what follows it, in a cell of a table.
fn one_paragraph(help: &str) -> String {
    let paragraphs: Vec<_> = help.split("\n\n").map(sentence).collect();
    match help.split_once("\n\n") {
        Some(_) => paragraphs.join(" "),
        None => help.to_owned(),
    }
}

fn sentence(text: &str) -> String {
    let text = text.trim();
    if text.ends_with(['.', ']']) { text.to_owned() } else { format!("{text}.") }
}

/// Text that follows a colon.
fn lower(text: &str) -> String {
    let mut words = text.chars();
    words.next().map(|first| first.to_lowercase().chain(words).collect()).unwrap_or_default()
}

/// The how-to for workers: the advice about each reason, in a Fetch and in a settlement.
fn advice() -> [Advice; 2] {
    let page = read("docs/how-to/write-a-worker.md");
    ["\nIf a Fetch fails:\n", "\nIf a settlement fails:\n"].map(|heading| {
        let (_, rest) = page.split_once(heading).unwrap();
        let rows = rest.trim_start().lines().take_while(|line| line.starts_with('|')).skip(2);
        let cells = rows.map(|row| row.trim_matches('|').split_once(" | ").unwrap());
        let reasons = |cell: &str| cell.split('`').skip(1).step_by(2).map(str::to_owned).collect();
        cells.map(|(action, cell)| (action.trim().to_owned(), reasons(cell))).collect()
    })
}

#[test]
fn worker_is_told_what_to_do_about_each_reason() {
    let [fetch, settle] = advice();
    for advice in [&fetch, &settle] {
        let mut all: Vec<_> = advice.values().flatten().collect();
        all.sort();
        let number = all.len();
        all.dedup();
        assert_eq!(all.len(), number, "a reason stands in two rows: {advice:#?}");
        let known = |name: &&String| Reason::ALL.iter().any(|reason| reason.name() == *name);
        assert!(all.iter().all(known), "{all:?}");
    }
    for reason in Reason::ALL {
        let mut actions = fetch.iter().chain(&settle);
        let mut found =
            actions.by_ref().filter(|(_, names)| names.iter().any(|n| n == reason.name()));
        let (action, _) = found.next().unwrap_or_else(|| panic!("{} is missing", reason.name()));
        let should = reason.retry_after().is_some() || *reason == Reason::SettleUnconfirmed;
        for action in [action].into_iter().chain(found.map(|(action, _)| action)) {
            assert_eq!(action.starts_with("repeat"), should, "{}: {action}", reason.name());
        }
    }
}

#[test]
fn retry_policy_covers_each_reason_that_is_worth_repeating() {
    let page = read("docs/how-to/configure-the-channel.md");
    let json = page.split("```json").nth(1).unwrap().split("```").next().unwrap();
    let config: serde_json::Value = serde_json::from_str(json).unwrap();
    let codes = |method: &str| -> String {
        let all = config["methodConfig"].as_array().unwrap();
        let names = |one: &&serde_json::Value| one["name"].to_string().contains(method);
        let codes = &all.iter().find(names).unwrap()["retryPolicy"]["retryableStatusCodes"];
        codes.to_string().replace('_', "").to_lowercase()
    };
    let mut count = 0;
    for (advice, codes) in advice().iter().zip([codes("\"Fetch\""), codes("\"Settle\"")]) {
        let repeated = advice.iter().filter(|(action, _)| action.starts_with("repeat"));
        for name in repeated.flat_map(|(_, names)| names) {
            let reason = Reason::ALL.iter().find(|reason| reason.name() == name).unwrap();
            let code = format!("\"{:?}\"", reason.code()).to_lowercase();
            assert!(codes.contains(&code), "no library repeats {name}, which is {code}");
            count += 1;
        }
    }
    assert!(count > 15, "the reading is broken");
}

#[test]
fn contract_explains_each_reason() {
    let contract = read("proto/fetchproxy/v1/fetch.proto");
    for reason in Reason::ALL {
        assert!(contract.contains(reason.name()), "{} is not in the contract", reason.name());
    }
}

#[test]
fn first_pages_stay_short() {
    for (page, most) in [("README.md", 110), ("ARCHITECTURE.md", 200)] {
        let lines = read(page).lines().count();
        assert!(lines <= most, "{page} has {lines} lines, and may have {most}");
    }
}
