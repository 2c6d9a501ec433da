//! The parts that the page is made of: tables, facts and cells. Pure. Each text of strangers goes through [`name`] or
//! [`id`].

use std::time::Duration;

use maud::{Markup, html};

use super::words::{length, number, visible};

/// A column of a table: its heading, and whether it has numbers.
pub(super) type Column<'c> = (&'c str, bool);

/// Something that happened later was a moment ago.
const JUST_NOW: Duration = Duration::from_secs(2);

/// A table in a section. A wide one becomes a list where there is no room. Each row has a cell for each column.
pub(super) fn table(
    (title, wide): (&str, bool),
    columns: &[Column<'_>],
    rows: impl IntoIterator<Item = Vec<Markup>>,
    empty: &str,
    note: Option<Markup>,
) -> Markup {
    let rows: Vec<_> = rows.into_iter().collect();
    html! {
        section {
            @if rows.is_empty() {
                h2 { (title) }
                p.soft { (empty) }
            } @else {
                table.wide[wide] {
                    caption { h2 { (title) } }
                    thead { tr {
                        @for (heading, numeric) in columns {
                            th scope="col" .num[*numeric] { (heading) }
                        }
                    } }
                    tbody {
                        @for row in rows {
                            tr {
                                @for ((heading, numeric), cell) in columns.iter().zip(row) {
                                    td data-label=(heading) .num[*numeric] .bar[heading.is_empty()] {
                                        div { (cell) }
                                    }
                                }
                            }
                        }
                    }
                }
                @if let Some(note) = note { p.note { (note) } }
            }
        }
    }
}

pub(super) fn fact(term: &str, value: Markup) -> Markup {
    html! { div { dt { (term) } dd { (value) } } }
}

/// A text of strangers. Its direction does not spread.
pub(super) fn name(text: &str) -> Markup {
    if text.is_empty() {
        none()
    } else {
        html! { bdi { (visible(text)) } }
    }
}

pub(super) fn id(text: &str) -> Markup {
    if text.is_empty() {
        none()
    } else {
        html! { span.id { (visible(text)) } }
    }
}

pub(super) fn consumer_name(stream: &str, consumer: &str) -> Markup {
    html! { (name(consumer)) small { (name(stream)) } }
}

pub(super) fn ago_in_words(ago: Duration) -> Markup {
    html! { @if ago < JUST_NOW { "just now" } @else { (length(ago)) " ago" } }
}

pub(super) fn replica_name(replica: &str, instance: &str) -> Markup {
    html! { (name(replica)) small { span.id { (visible(instance)) } } }
}

pub(super) fn of_most(value: u64, most: u64) -> Markup {
    html! { (number(value)) @if most > 0 { span.soft { " of " (number(most)) } } }
}

pub(super) fn age(of: Option<Duration>) -> Markup {
    of.map_or_else(none, |of| html! { (length(of)) })
}

pub(super) fn none() -> Markup {
    html! { span.none { "–" } }
}
