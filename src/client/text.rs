//! Renders answers for people. Text from a message is escaped, so that a terminal never obeys it.

use std::{collections::BTreeMap, fmt::Write as _};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use prost_types::Duration as PbDuration;

use super::format::{length, time, word};
use crate::pb::{self, delivery::Payload};

/// The number of characters that name a token: its last ones, because all tokens begin alike.
const NAME: usize = 8;

/// The results of the settlements of a Fetch, then its messages.
pub(super) fn settled_and_fetched(tokens: &[String], answer: &pb::FetchResponse) -> String {
    let mut text = String::new();
    for (token, result) in tokens.iter().zip(&answer.results) {
        let _ = writeln!(text, "{}", named(token, result));
    }
    if !tokens.is_empty() {
        text.push('\n');
    }
    match (answer.empty_reason(), &answer.error) {
        (pb::EmptyReason::Settle, _) => text.push_str("nothing was fetched: a settlement failed"),
        (_, Some(error)) => {
            let (reason, message) = (plain(&error.reason), plain(&error.message));
            let _ = write!(text, "nothing was fetched: {reason}: {message}");
        }
        (_, None) => text.push_str(&fetched(answer)),
    }
    text
}

fn fetched(answer: &pb::FetchResponse) -> String {
    let mut text = String::new();
    for message in &answer.messages {
        delivered(&mut text, message);
    }
    for rejected in &answer.rejected {
        let (subject, detail) = (plain(&rejected.subject), plain(&rejected.detail));
        let sequence = rejected.stream_sequence;
        let _ = writeln!(text, "{subject}  sequence {sequence}, rejected: {detail}");
        if !rejected.token.is_empty() {
            let _ = writeln!(text, "  still leased to you, with this token:\n{}\n", rejected.token);
        }
    }
    if answer.messages.is_empty() {
        let _ = writeln!(text, "no messages: {}", why_empty(answer.empty_reason()));
    }
    let _ = match answer.pending {
        1 => write!(text, "1 more message is waiting"),
        pending => write!(text, "{pending} more messages are waiting"),
    };
    text
}

fn delivered(text: &mut String, message: &pb::Delivery) {
    let of = match message.max_deliver {
        0 => String::new(),
        most => format!(" of {most}"),
    };
    let _ = writeln!(
        text,
        "{}  sequence {}, attempt {}{of}, published {}",
        plain(&message.subject),
        message.stream_sequence,
        message.delivery_count,
        time(message.publish_time.as_ref()).unwrap_or_default(),
    );
    let headers = BTreeMap::from_iter(&message.headers);
    for (name, values) in headers {
        for value in &values.values {
            let _ = writeln!(text, "  {}: {}", plain(name), plain(value));
        }
    }
    let _ = writeln!(text, "  {}", payload(message.payload.as_ref()));
    let _ =
        writeln!(text, "  leased to you for {}, with this token:", span(message.lease.as_ref()));
    let _ = writeln!(text, "{}\n", message.token);
}

fn why_empty(reason: pb::EmptyReason) -> &'static str {
    match reason {
        pb::EmptyReason::NoMessages | pb::EmptyReason::Unspecified => "there is nothing to deliver",
        pb::EmptyReason::MaxAckPending => "the consumer has max_ack_pending unsettled messages",
        pb::EmptyReason::Paused => "the consumer is paused",
        pb::EmptyReason::Draining => "this replica is draining; fetch again",
        pb::EmptyReason::Rejected => "all messages were rejected",
        pb::EmptyReason::Settle => "a settlement failed",
        pb::EmptyReason::AttemptOver => "the attempt is over; fetch with a new name",
        pb::EmptyReason::FetchFailed => "the fetch failed after its settlements",
        pb::EmptyReason::Credit => "the stream holds as much as its credit allows",
        pb::EmptyReason::LeaseLimit => "no more leases may be held",
        pb::EmptyReason::NatsUnavailable => "NATS is away",
    }
}

/// Renders a payload. Its lines are indented, so that none looks like a line of our own.
fn payload(payload: Option<&Payload>) -> String {
    match payload {
        None => String::new(),
        Some(Payload::Text(text)) => {
            text.split('\n').map(plain_line).collect::<Vec<_>>().join("\n  ")
        }
        Some(Payload::Data(bytes)) => {
            format!("{} bytes, in base64: {}", bytes.len(), STANDARD.encode(bytes))
        }
    }
}

/// Escapes the characters that a terminal would treat as commands.
pub(crate) fn plain(text: &str) -> String {
    escaped(text, |character| character.is_control())
}

/// Escapes the same characters except tabs, for a line of a payload.
fn plain_line(line: &str) -> String {
    escaped(line, |character| character.is_control() && character != '\t')
}

fn escaped(text: &str, which: impl Fn(char) -> bool) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        if which(character) {
            shown.extend(character.escape_default());
        } else {
            shown.push(character);
        }
    }
    shown
}

/// The caller, as the proxy knows it.
pub(super) fn caller(answer: &pb::WhoAmIResponse) -> String {
    let or = |text: &str, empty: &str| match text {
        "" => empty.to_owned(),
        text => plain(text),
    };
    let until = time(answer.credential_expire_time.as_ref());
    format!(
        "identity   {}\nprincipal  {}\nverbs      {}\ngood until {}\npolicy     {}",
        plain(&answer.identity),
        or(&answer.principal, "none"),
        or(&answer.verbs.join(", "), "none"),
        until.unwrap_or_else(|| "no end is known".to_owned()),
        or(&answer.policy_digest, "none"),
    )
}

/// A consumer, as a worker sees it.
pub(super) fn consumer(answer: &pb::GetConsumerResponse) -> String {
    let limit = |most: u64| if most == 0 { "no limit".to_owned() } else { most.to_string() };
    let spans: Vec<String> = answer.backoff.iter().map(|wait| exact(Some(wait))).collect();
    let list = |all: &[String], empty: &str| match all {
        [] => empty.to_owned(),
        all => all.iter().map(|one| plain(one)).collect::<Vec<_>>().join(", "),
    };
    let usable = match (&*answer.unsuitable, answer.paused) {
        ("", false) => "yes".to_owned(),
        ("", true) => "yes, and it is paused".to_owned(),
        (property, _) => format!("no: {}", plain(property)),
    };
    format!(
        "usable        {usable}\npending       {}\nack pending   {} of {}\nwaiting pulls {}\n\
         attempts      {}\nack wait      {}\nbackoff       {}\nfilter        {}\ncreated       {}\n\
         default lease {}\nlongest lease {}\nlargest Fetch {} messages",
        answer.pending,
        answer.ack_pending,
        limit(answer.max_ack_pending),
        answer.waiting,
        limit(answer.max_deliver.into()),
        exact(answer.ack_wait.as_ref()),
        list(&spans, "none"),
        list(&answer.filter_subjects, "all subjects"),
        time(answer.create_time.as_ref()).unwrap_or_else(|| "not known".to_owned()),
        exact(answer.unset_lease.as_ref()),
        exact(answer.max_lease.as_ref()),
        answer.max_messages,
    )
}

/// A length of time with all its parts.
fn exact(of: Option<&PbDuration>) -> String {
    humantime::format_duration(length(of).unwrap_or_default()).to_string()
}

/// One line for each token. With several tokens, each line begins with the end of its token.
pub(super) fn settled(tokens: &[String], results: &[pb::SettleResult]) -> String {
    let line = |(token, result): (&String, &pb::SettleResult)| {
        if tokens.len() == 1 {
            return settlement(result);
        }
        named(token, result)
    };
    tokens.iter().zip(results).map(line).collect::<Vec<_>>().join("\n")
}

/// One line, which begins with the end of the token.
fn named(token: &str, result: &pb::SettleResult) -> String {
    let skipped = token.chars().count().saturating_sub(NAME);
    let name: String = token.chars().skip(skipped).collect();
    format!("…{}  {}", plain(&name), settlement(result))
}

fn settlement(result: &pb::SettleResult) -> String {
    if let Some(error) = &result.error {
        return format!("{}: {}", plain(&error.reason), plain(&error.message));
    }
    let mut text = word(result.outcome()).to_owned();
    if let Some(again) = time(result.redeliver_time.as_ref()) {
        let _ = write!(text, ", delivered again from {again}");
    }
    if let Some(end) = time(result.lease_expire_time.as_ref()) {
        let _ = write!(text, ", leased to you until {end}");
    }
    text
}

fn span(of: Option<&PbDuration>) -> String {
    let whole = length(of).unwrap_or_default().as_secs();
    humantime::format_duration(std::time::Duration::from_secs(whole)).to_string()
}
