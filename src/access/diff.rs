//! The difference between two policies, in words.

use std::collections::HashMap;

use super::{
    compiled::Policy,
    document::{PrincipalEntry, RuleEntry},
    pattern::Pattern,
};

/// The lines that tell two policies apart. `+` is new, `-` is gone, `~` is changed, and `!` is a principal
/// with a new name, whose live tokens no longer have an owner.
pub fn diff(old: &Policy, new: &Policy) -> Vec<String> {
    let mut lines = Vec::new();
    if old.authenticate() != new.authenticate() {
        lines.push("~ authenticate".to_owned());
    }
    principals(old, new, &mut lines);
    renamed(old, new, &mut lines);
    rules(old, new, &mut lines);
    lines
}

fn by_name(policy: &Policy) -> HashMap<&str, &PrincipalEntry> {
    policy.document.principals.0.iter().map(|entry| (&*entry.name.0, entry)).collect()
}

fn principals(old: &Policy, new: &Policy, lines: &mut Vec<String>) {
    let (before, after) = (by_name(old), by_name(new));
    for entry in &old.document.principals.0 {
        if !after.contains_key(&*entry.name.0) {
            lines.push(format!("- principal {}", entry.name.0));
        }
    }
    for entry in &new.document.principals.0 {
        let name = &entry.name.0;
        let Some(earlier) = before.get(&**name) else {
            lines.push(format!("+ principal {name}"));
            continue;
        };
        let missing = |of: &PrincipalEntry, from: &PrincipalEntry| -> Vec<Pattern> {
            let gone = of.patterns.0.iter().filter(|pattern| !from.patterns.0.contains(pattern));
            gone.cloned().collect()
        };
        for pattern in missing(earlier, entry) {
            lines.push(format!("~ principal {name}: no longer matches {pattern}"));
        }
        for pattern in missing(entry, earlier) {
            lines.push(format!("~ principal {name}: now matches {pattern}"));
        }
        if earlier.limits != entry.limits {
            lines.push(format!("~ principal {name}: limits"));
        }
    }
    let order = |policy: &Policy, others: &HashMap<&str, &PrincipalEntry>| -> Vec<Box<str>> {
        let names = policy.document.principals.0.iter().map(|entry| entry.name.0.clone());
        names.filter(|name| others.contains_key(&**name)).collect()
    };
    if order(old, &after) != order(new, &before) {
        lines.push(
            "~ principals: another order, so an identity may be another principal".to_owned(),
        );
    }
}

/// Patterns that stayed, and now belong to a principal with another name.
fn renamed(old: &Policy, new: &Policy, lines: &mut Vec<String>) {
    let owners = |policy: &Policy| -> HashMap<Pattern, Box<str>> {
        let mut owners = HashMap::new();
        for entry in &policy.document.principals.0 {
            for pattern in &entry.patterns.0 {
                owners.entry(pattern.clone()).or_insert_with(|| entry.name.0.clone());
            }
        }
        owners
    };
    let after = owners(new);
    let mut seen = Vec::new();
    for entry in &old.document.principals.0 {
        for pattern in &entry.patterns.0 {
            if let Some(name) = after.get(pattern)
                && *name != entry.name.0
                && !seen.contains(&(&entry.name.0, name))
            {
                seen.push((&entry.name.0, name));
                lines.push(format!(
                    "! {pattern} was {} and is {name}: it cannot settle its live tokens any more",
                    entry.name.0
                ));
            }
        }
    }
}

fn rules(old: &Policy, new: &Policy, lines: &mut Vec<String>) {
    let mut left: Vec<&RuleEntry> = new.document.rules.0.iter().collect();
    for (place, rule) in old.document.rules.0.iter().enumerate() {
        match left.iter().position(|other| *other == rule) {
            Some(same) => drop(left.swap_remove(same)),
            None => lines.push(format!(
                "- rule in line {} of the old file: {}",
                old.line_of("rules", place),
                rule.in_words()
            )),
        }
    }
    for (place, rule) in new.document.rules.0.iter().enumerate() {
        // A rule that is left is new. Each of several equal rules stands for itself.
        if let Some(same) = left.iter().position(|other| std::ptr::eq(*other, rule)) {
            left.swap_remove(same);
            lines.push(format!(
                "+ rule in line {} of the new file: {}",
                new.line_of("rules", place),
                rule.in_words()
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = "
version: 1
principals:
- {name: a, match: ['key:a', 'key:b']}
- {name: c, match: ['key:c']}
rules:
- {principals: [a], streams: [S], consumers: ['*'], verbs: [work]}
- {principals: ['*'], streams: [T], consumers: [t], verbs: [fetch]}
";

    fn changed(pairs: &[(&str, &str)]) -> Vec<String> {
        let mut new = OLD.to_owned();
        for (old, instead) in pairs {
            assert!(new.contains(old), "{old}");
            new = new.replace(old, instead);
        }
        diff(&Policy::parse(OLD).unwrap(), &Policy::parse(&new).unwrap())
    }

    #[test]
    fn same_meaning_in_other_words_is_no_difference() {
        let nothing: &[String] = &[];
        assert_eq!(
            changed(&[("\nversion", "\n# a comment\nversion"), ("'key:a'", "key:a")]),
            nothing
        );
        // Rules in another order allow the same.
        let lines: Vec<_> = OLD.lines().collect();
        let swapped = [&lines[..6], &[lines[7], lines[6]]].concat().join("\n");
        assert_eq!(diff(&Policy::parse(OLD).unwrap(), &Policy::parse(&swapped).unwrap()), nothing);
    }

    #[test]
    fn each_kind_of_change_has_its_line() {
        for (pairs, lines) in [
            (
                &[("\nversion", "\nauthenticate: {anonymous: true}\nversion")][..],
                &["~ authenticate"][..],
            ),
            (
                &[("'key:b'", "'key:d'")],
                &["~ principal a: no longer matches key:b", "~ principal a: now matches key:d"],
            ),
            (&[("['key:c']", "['key:c'], limits: {max_calls: 3}")], &["~ principal c: limits"]),
            (
                &[("name: c", "name: d")],
                &[
                    "- principal c",
                    "+ principal d",
                    "! key:c was c and is d: it cannot settle its live tokens any more",
                ],
            ),
            (
                &[("verbs: [fetch]", "verbs: [work]")],
                &[
                    "- rule in line 8 of the old file: * may fetch on T / t",
                    "+ rule in line 8 of the new file: * may fetch, settle, extend on T / t",
                ],
            ),
            (
                &[
                    ("{name: a, match: ['key:a', 'key:b']}", "X"),
                    ("{name: c, match: ['key:c']}", "{name: a, match: ['key:a', 'key:b']}"),
                    ("X", "{name: c, match: ['key:c']}"),
                ],
                &["~ principals: another order, so an identity may be another principal"],
            ),
        ] {
            assert_eq!(changed(pairs), lines, "{pairs:?}");
        }
    }
}
