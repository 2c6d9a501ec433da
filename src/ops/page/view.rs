//! The page as HTML. Pure: it shows a snapshot. The templates escape every text; a text of strangers is made visible,
//! too.

use std::time::Duration;

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::{
    parts::{age, ago_in_words, consumer_name, fact, id, name, none, of_most, replica_name, table},
    snapshot::{NatsShown, Snapshot},
    words::{length, number, short, time, visible},
};
use crate::{
    admin::{LeaseAges, Overview},
    pb::{
        self,
        time::{to_duration, to_unix},
    },
};

/// Most digits of an identifier that a table shows beside a name.
const SHORT_ID: usize = 8;

/// The page. If it is `refreshing`, it loads itself again every 5 s.
pub(super) fn page(snapshot: &Snapshot, style: &str, refreshing: bool) -> String {
    let Snapshot { overview, .. } = snapshot;
    let us = overview.replicas.iter().find(|replica| replica.instance == overview.instance);
    let us = us.cloned().unwrap_or_default();
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                @if refreshing { meta http-equiv="refresh" content="5"; }
                title { "fetch-proxy " (visible(&us.name)) }
                style { (PreEscaped(style)) }
            }
            body {
                header {
                    h1 { span.soft { "fetch-proxy" } (name(&us.name)) (state(&us)) }
                    p.soft { "as of " (time(overview.as_of)) }
                }
                main {
                    (missing(&overview.unreachable))
                    (this_replica(snapshot, &us))
                    (replicas(overview))
                    (consumers(overview))
                    div.pair { (lease_ages(overview)) (nats(&snapshot.nats)) }
                    (oldest_leases(overview))
                    (refusals(snapshot))
                }
                footer { (links(snapshot, refreshing)) }
            }
        }
    };
    page.into_string()
}

fn links(snapshot: &Snapshot, refreshing: bool) -> Markup {
    html! {
        @if refreshing {
            a href="/" { "Stop loading this page every 5 s" }
        } @else {
            a href="/?refresh=5" { "Load this page every 5 s" }
        }
        @if snapshot.has_metrics { a href="/metrics" { "Metrics" } }
        a href="/readyz" { "Readiness" }
        span { "This page shows no token and no message, and changes nothing." }
    }
}

fn missing(unreachable: &[pb::UnreachableReplica]) -> Markup {
    html! {
        @if !unreachable.is_empty() {
            section.alarm {
                h2 { "Replicas that do not answer: their rows are missing" }
                ul {
                    @for replica in unreachable {
                        li { (replica_name(&replica.name, &replica.instance)) ": " (name(&replica.why)) }
                    }
                }
            }
        }
    }
}

fn this_replica(snapshot: &Snapshot, us: &pb::Replica) -> Markup {
    let Snapshot { overview, cluster, insecure, .. } = snapshot;
    let up =
        us.start_time.as_ref().and_then(to_unix).map(|began| overview.as_of.saturating_sub(began));
    let keys = us.key_ids.iter().map(|id| visible(id)).collect::<Vec<_>>().join(", ");
    html! {
        section {
            h2 { "This replica" }
            dl {
                (fact("Instance", html! { span.id { (visible(&us.instance)) } }))
                (fact("Version", name(&us.version)))
                (fact("Up for", up.map_or_else(none, |up| html! { (length(up)) })))
                (fact("Cluster", name(cluster)))
                (fact("Leases", of_most(us.leases, us.max_leases)))
                (fact("Open Fetch calls", html! { (number(us.waiters)) }))
                (fact("Token keys, the first one seals", html! { span.id { (keys) } }))
                (fact("Policy", match us.policy_digest.is_empty() {
                    true => html! { "none" },
                    false => html! { span.id { (visible(&us.policy_digest)) } },
                }))
                @if *insecure {
                    (fact("Callers", html! { span.tag.odd { "anybody, by --insecure" } }))
                }
            }
        }
    }
}

fn nats(nats: &NatsShown) -> Markup {
    let rows = nats.connections.iter().map(|(role, down)| {
        let state = match down {
            None => html! { span.tag.good { "up" } },
            Some(why) => html! { span.tag.bad { "down" } small { (name(why)) } },
        };
        vec![html! { (role) }, state]
    });
    let note = html! {
        @match nats.round_trip {
            Some(took) => { "The last message to ourselves took " (short(took)) ". " }
            None => { "No message to ourselves has come back yet. " }
        }
        "Servers: " (name(&nats.servers)) ". "
        @match nats.own_connections {
            0 => {}
            1 => { "1 consumer has a connection of its own, after a message that cannot be read." }
            many => { (many) " consumers have connections of their own, after messages that cannot be read." }
        }
    };
    let columns = [("Connection for", false), ("State", false)];
    table(("NATS", false), &columns, rows, "no connection", Some(note))
}

fn replicas(overview: &Overview) -> Markup {
    let columns = [
        ("Replica", false),
        ("State", false),
        ("Version", false),
        ("Leases", true),
        ("Fetch calls", true),
        ("Consumers", true),
        ("Policy", false),
        ("NATS server", false),
        ("Heard", false),
    ];
    let rows = overview.replicas.iter().map(|replica| {
        let silent = overview.unreachable.iter().any(|gone| gone.instance == replica.instance);
        let heard = replica.heard_ago.as_ref().and_then(to_duration);
        vec![
            replica_name(&replica.name, &replica.instance),
            if silent {
                html! { span.tag.bad { "does not answer" } }
            } else {
                state(replica)
            },
            name(&replica.version),
            of_most(replica.leases, replica.max_leases),
            html! { (number(replica.waiters)) },
            html! { (number(replica.consumers)) },
            id(&replica.policy_digest),
            server(&replica.nats_server),
            heard.map_or_else(|| html! { "this one" }, ago_in_words),
        ]
    });
    table(("Replicas", true), &columns, rows, "no replica", None)
}

fn consumers(overview: &Overview) -> Markup {
    let columns = [
        ("Consumer", false),
        ("Pending", true),
        ("Unsettled", true),
        ("Leases", true),
        ("Fetch calls", true),
        ("Oldest lease", true),
        ("Replicas", true),
        ("State", false),
    ];
    let rows = overview.consumers.iter().map(|consumer| {
        let total = consumer.total.clone().unwrap_or_default();
        let known = consumer.info_age.is_some();
        vec![
            consumer_name(&consumer.stream, &consumer.consumer),
            if known {
                html! { (number(consumer.pending)) }
            } else {
                none()
            },
            if known { of_most(consumer.ack_pending, consumer.max_ack_pending) } else { none() },
            html! { (number(total.leases)) },
            html! { (number(total.waiters)) },
            age(total.oldest_lease.as_ref().and_then(to_duration)),
            html! { (consumer.shares.len()) },
            consumer_state(consumer),
        ]
    });
    let note = match overview.more_consumers {
        (0, false) => None,
        (more, false) => {
            Some(html! { "and " (more) " more: " code { "fetch-proxy consumers" } " has them all" })
        }
        (more, true) => Some(
            html! { "and at least " (more) " more: " code { "fetch-proxy consumers" } " has them all" },
        ),
    };
    table(("Consumers", true), &columns, rows, "no consumer is served now", note)
}

fn consumer_state(consumer: &pb::Consumer) -> Markup {
    let full = consumer.max_ack_pending > 0 && consumer.ack_pending >= consumer.max_ack_pending;
    html! {
        @if consumer.paused { span.tag.odd { "paused" } }
        @else if full { span.tag.odd { "at max_ack_pending" } }
        @else if consumer.suspended.is_empty() { span.tag.good { "served" } }
        @if !consumer.suspended.is_empty() {
            span.tag.bad { "not pulled" }
            small { (name(&consumer.suspended)) }
        }
    }
}

fn oldest_leases(overview: &Overview) -> Markup {
    let columns = [
        ("Consumer", false),
        ("Message", true),
        ("Attempt", true),
        ("Held for", true),
        ("Ends in", true),
        ("Worker and peer", false),
        ("Principal", false),
        ("Replica", false),
    ];
    let rows = overview.leases.iter().map(|lease| {
        vec![
            consumer_name(&lease.stream, &lease.consumer),
            html! { (number(lease.stream_sequence)) },
            attempt(lease),
            age(lease.age.as_ref().and_then(to_duration)),
            ends_in(lease),
            html! { (name(&lease.worker)) small { (name(&lease.peer)) } },
            name(&lease.principal),
            replica_by_id(overview, &lease.replica),
        ]
    });
    let all: u64 = overview.replicas.iter().map(|replica| replica.leases).sum();
    let more = all.saturating_sub(overview.leases.len() as u64);
    let note = (more > 0).then(|| {
        html! { "and " (number(more)) " more: " code { "fetch-proxy leases" } " has them all, with filters" }
    });
    table(("Oldest leases", true), &columns, rows, "no caller holds a message", note)
}

fn attempt(lease: &pb::Lease) -> Markup {
    html! {
        (of_most(lease.delivery_count, lease.max_deliver))
        @if lease.last_attempt { small { span.tag.odd { "the last" } } }
    }
}

fn ends_in(lease: &pb::Lease) -> Markup {
    let granted = lease.grant_time.as_ref().and_then(to_unix);
    let now =
        granted.zip(lease.age.as_ref().and_then(to_duration)).map(|(granted, age)| granted + age);
    let end = lease.expire_time.as_ref().and_then(to_unix);
    let left = end.zip(now).map(|(end, now)| end.saturating_sub(now));
    html! {
        (age(left))
        @match lease.state() {
            pb::LeaseState::Settling => small { span.tag { "settling" } },
            pb::LeaseState::Uncertain => small { span.tag.odd { "uncertain" } },
            pb::LeaseState::Held | pb::LeaseState::Unspecified => {}
        }
    }
}

fn lease_ages(overview: &Overview) -> Markup {
    let columns = [("Held for", false), ("Leases", true), ("", false)];
    let Some(LeaseAges { without_caller, held }) = overview.ages else {
        let busy = "other operators ask for the leases now: load the page again";
        return table(("Leases of this replica by age", false), &columns, [], busy, None);
    };
    let bounds =
        LeaseAges::BOUNDS.map(|bound| length(Duration::from_secs(bound)).replace(" 0 s", ""));
    let bounds = bounds.map(|bound| bound.replace(" 0 min", ""));
    let labels = bounds.iter().map(|bound| format!("less than {bound}"));
    let longest = bounds.last().map(|bound| format!("{bound} or longer")).unwrap_or_default();
    let held = labels.chain([longest]).zip(held);
    let all: Vec<_> =
        [("by no caller yet".to_owned(), without_caller)].into_iter().chain(held).collect();
    let most = all.iter().map(|(_, leases)| *leases).max().unwrap_or(0).max(1);
    let rows = all.into_iter().map(|(label, leases)| {
        let width = leases as f64 * 100.0 / most as f64;
        vec![
            html! { (label) },
            html! { (number(leases)) },
            html! {
                svg viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true" {
                    rect width=(format!("{width:.1}")) height="8" {}
                }
            },
        ]
    });
    table(("Leases of this replica by age", false), &columns, rows, "", None)
}

fn refusals(snapshot: &Snapshot) -> Markup {
    let columns = [
        ("Reason", false),
        ("Call", false),
        ("Consumer", false),
        ("Principal", false),
        ("Times", true),
        ("Last", true),
    ];
    let rows = snapshot.refusals.iter().map(|(refusal, ago)| {
        let consumer = refusal.consumer.as_ref();
        vec![
            html! { span.id.word { (refusal.reason) } },
            html! { span.word { (refusal.call) } },
            consumer.map_or_else(none, |name| consumer_name(&name.stream, &name.consumer)),
            refusal.principal.as_deref().map_or_else(none, name),
            html! { (number(refusal.count)) },
            ago_in_words(*ago),
        ]
    });
    let note = html! { "The last 20 kinds. Times: since the kind was first seen among them." };
    let title = ("Refused by this replica", true);
    table(title, &columns, rows, "nothing was refused", Some(note))
}

fn state(replica: &pb::Replica) -> Markup {
    html! {
        @if replica.draining { span.tag.odd { "draining" } }
        @else if replica.ready { span.tag.good { "ready" } }
        @else {
            span.tag.bad { "not ready" @if !replica.why_not_ready.is_empty() { ": " (visible(&replica.why_not_ready)) } }
        }
    }
}

fn replica_by_id(overview: &Overview, instance: &str) -> Markup {
    let known = overview.replicas.iter().find(|replica| replica.instance == instance);
    match known.filter(|replica| !replica.name.is_empty()) {
        Some(replica) => name(&replica.name),
        None => id(instance),
    }
}

/// The identifier, the version and the name of a server. The identifier is long, and its beginning tells enough.
fn server(text: &str) -> Markup {
    let Some((server, rest)) = text.split_once(' ') else { return name(text) };
    let known = server.chars().take(SHORT_ID).collect::<String>();
    html! { (name(rest)) small { span.id { (visible(&known)) "…" } } }
}

#[cfg(test)]
mod tests {
    use prost_types::{Duration as PbDuration, Timestamp};

    use super::*;
    use crate::{broker::ConsumerName, clock, refusal_log::RecentRefusal};

    /// Breaks out of a text, an attribute in each kind of quotes, a comment, and a line.
    const HOSTILE: &str = "</td>\"'><script>alert(1)</script><!--\n\r\u{202e}&amp;";

    fn hostile() -> Snapshot {
        let text = || HOSTILE.to_owned();
        let replica = pb::Replica {
            instance: text(),
            name: text(),
            version: text(),
            why_not_ready: text(),
            policy_digest: text(),
            key_ids: vec![text()],
            nats_server: text(),
            ..pb::Replica::default()
        };
        let unreachable = pb::UnreachableReplica { instance: text(), name: text(), why: text() };
        let consumer = pb::Consumer {
            stream: text(),
            consumer: text(),
            suspended: text(),
            ..pb::Consumer::default()
        };
        let lease = pb::Lease {
            replica: text(),
            stream: text(),
            consumer: text(),
            principal: text(),
            identity: text(),
            worker: text(),
            peer: text(),
            ..pb::Lease::default()
        };
        let name = ConsumerName { stream: HOSTILE.into(), consumer: HOSTILE.into() };
        let refusal = RecentRefusal {
            call: "Fetch",
            reason: "STREAM_NOT_FOUND",
            consumer: Some(name),
            principal: Some(text()),
            count: 1,
            last: clock::now(),
        };
        Snapshot {
            overview: Overview {
                instance: text(),
                replicas: vec![replica],
                unreachable: vec![unreachable],
                consumers: vec![consumer],
                leases: vec![lease],
                ..Overview::default()
            },
            refusals: vec![(refusal, Duration::ZERO)],
            nats: NatsShown {
                servers: text(),
                connections: vec![("settling", Some(text()))],
                ..NatsShown::default()
            },
            cluster: text(),
            insecure: true,
            has_metrics: true,
        }
    }

    #[test]
    fn hostile_names_stay_texts() {
        let page = page(&hostile(), "p{}", false);
        let body = page.split_once("<body>").unwrap().1;
        assert!(!page.contains("<script") && !page.contains("<!--") && !page.contains('\u{202e}'));
        assert!(!page.contains(['\n', '\r']), "a line break of a name");
        // One text for each field of `hostile`, with the title and the replica of the lease.
        let escaped = "&lt;script&gt;alert(1)&lt;/script&gt;&lt;!--\\u{a}\\u{d}\\u{202e}&amp;amp;";
        assert_eq!(page.matches(escaped).count(), 30, "{page}");
        // All quotes of the page are those of the template, in pairs.
        for tag in body.split('<').skip(1).filter_map(|part| part.split('>').next()) {
            assert_eq!(tag.matches('"').count() % 2, 0, "<{tag}>");
        }
    }

    #[test]
    fn page_says_what_is_missing_and_what_is_more() {
        let mut snapshot = hostile();
        snapshot.overview.replicas[0].leases = 1235;
        snapshot.overview.more_consumers = (7, true);
        let lease = &mut snapshot.overview.leases[0];
        lease.grant_time = Some(Timestamp { seconds: 1000, nanos: 0 });
        lease.age = Some(PbDuration { seconds: 61, nanos: 0 });
        lease.expire_time = Some(Timestamp { seconds: 1100, nanos: 0 });
        (lease.delivery_count, lease.max_deliver, lease.last_attempt) = (2, 5, true);
        let page = page(&snapshot, "", true);
        for said in [
            "Replicas that do not answer",
            "and at least 7 more",
            "and 1\u{202f}234 more",
            "1 min 1 s",
            "39 s",
            "2<span class=\"soft\"> of 5</span>",
            "the last",
            "anybody, by --insecure",
            "http-equiv=\"refresh\"",
        ] {
            assert!(page.contains(said), "{said}: {page}");
        }
    }
}
