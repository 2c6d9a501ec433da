//! Entries of a policy that are legal and probably mistakes.

use super::{
    compiled::Policy,
    document::RuleEntry,
    identity::issuer_in,
    pattern::Pattern,
    place::{PathStep, PolicyError, locate},
    verbs::Verb,
};

/// Most warnings about one file.
const MAX_WARNINGS: usize = 50;

/// The probable mistakes in a policy, each with its place.
pub fn warnings(policy: &Policy) -> Vec<PolicyError> {
    let mut found = Vec::new();
    if !policy.authenticate().identifies() && !names_certificates(policy) {
        let message = "nothing in `authenticate` identifies a caller: without client certificates, \
                       no rule can allow anything to anybody but `anonymous`";
        found.push(PolicyError::at(&policy.text, &[], message));
    }
    if policy.authenticate().accept_anonymous_tokens {
        let path = [PathStep::Key("authenticate"), PathStep::Key("accept_anonymous_tokens")];
        let message = "each principal may settle the tokens from before the policy: remove this \
                       after the longest lease";
        found.push(PolicyError::at(&policy.text, &path, message));
    }
    found.extend(hidden_patterns(policy).take(MAX_WARNINGS));
    found.extend(capitals(policy).take(MAX_WARNINGS));
    found.extend(without_issuer(policy).take(MAX_WARNINGS));
    found.extend(fetch_alone(policy).take(MAX_WARNINGS));
    found.extend(without_rules(policy).take(MAX_WARNINGS));
    found.truncate(MAX_WARNINGS);
    found
}

/// All patterns, each with the places of its principal and of itself.
fn patterns(policy: &Policy) -> impl Iterator<Item = (usize, usize, &Pattern)> {
    policy.document.principals.0.iter().enumerate().flat_map(|(place, principal)| {
        principal.patterns.0.iter().enumerate().map(move |(index, pattern)| (place, index, pattern))
    })
}

/// A mistake in a pattern.
fn at_pattern(policy: &Policy, place: usize, index: usize, message: String) -> PolicyError {
    let path = [
        PathStep::Key("principals"),
        PathStep::Entry(place),
        PathStep::Key("match"),
        PathStep::Entry(index),
    ];
    PolicyError::at(&policy.text, &path, message)
}

/// Whether a pattern is only for identities of client certificates.
fn names_certificates(policy: &Policy) -> bool {
    let of_certificates = |text: &str| text.starts_with("spiffe://") || text.starts_with("dns:");
    patterns(policy).any(|(_, _, pattern)| of_certificates(pattern.as_str()))
}

/// Patterns of DNS names that match nothing, because names of certificates are in lower case.
fn capitals(policy: &Policy) -> impl Iterator<Item = PolicyError> {
    let capital = |text: &str| text.bytes().any(|byte| byte.is_ascii_uppercase());
    patterns(policy).filter_map(move |(place, index, pattern)| {
        pattern.as_str().strip_prefix("dns:").filter(|name| capital(name))?;
        let message =
            format!("`{pattern}` never counts: names of certificates are in lower case here");
        Some(at_pattern(policy, place, index, message))
    })
}

/// Patterns that match nothing, because a pattern of an earlier principal matches all of it.
fn hidden_patterns(policy: &Policy) -> impl Iterator<Item = PolicyError> {
    let principals = &policy.document.principals.0;
    patterns(policy).filter_map(move |(place, index, pattern)| {
        let mut earlier = principals[..place].iter();
        let (by, cover) = earlier.find_map(|earlier| {
            let cover = earlier.patterns.0.iter().find(|cover| cover.covers(pattern));
            cover.map(|cover| (earlier, cover))
        })?;
        let message = format!(
            "`{pattern}` never counts: `{cover}` of the earlier principal `{}` matches the same",
            by.name.0
        );
        Some(at_pattern(policy, place, index, message))
    })
}

/// Patterns of tokens of an issuer that the policy does not name.
fn without_issuer(policy: &Policy) -> impl Iterator<Item = PolicyError> {
    patterns(policy).filter_map(move |(place, index, pattern)| {
        let name = issuer_in(pattern.as_str()).filter(|name| !name.contains(['*', '?']))?;
        if policy.issuers().iter().any(|issuer| *issuer.name == *name) {
            return None;
        }
        let message = format!("`{pattern}` never counts: there is no issuer `{name}`");
        Some(at_pattern(policy, place, index, message))
    })
}

/// Rules that allow fetch to a principal that may not settle all of it: its messages come back.
fn fetch_alone(policy: &Policy) -> impl Iterator<Item = PolicyError> {
    let covered = |patterns: &[Pattern], by: &[Pattern]| {
        patterns.iter().all(|pattern| by.iter().any(|cover| cover.covers(pattern)))
    };
    let settles = move |rule: &RuleEntry, principal: &str| {
        policy.document.rules.0.iter().any(|other| {
            other.all_verbs().has(Verb::Settle)
                && other.is_for(principal)
                && covered(&rule.streams.0, &other.streams.0)
                && covered(&rule.consumers.0, &other.consumers.0)
        })
    };
    policy.document.rules.0.iter().enumerate().filter_map(move |(place, rule)| {
        let verbs = rule.all_verbs();
        if !verbs.has(Verb::Fetch) || verbs.has(Verb::Settle) {
            return None;
        }
        let mut principals = policy.document.principals.0.iter().map(|entry| &*entry.name.0);
        let name = principals.find(|name| rule.is_for(name) && !settles(rule, name))?;
        let path = [PathStep::Key("rules"), PathStep::Entry(place), PathStep::Key("verbs")];
        let message = format!(
            "`{name}` may fetch here and not settle: its messages come back until another settles them"
        );
        Some(PolicyError::at(&policy.text, &path, message))
    })
}

/// Principals that no rule is for.
fn without_rules(policy: &Policy) -> impl Iterator<Item = PolicyError> {
    policy.document.principals.0.iter().enumerate().filter_map(|(place, principal)| {
        let has_rule = policy.document.rules.0.iter().any(|rule| rule.is_for(&principal.name.0));
        if has_rule {
            return None;
        }
        let path = [PathStep::Key("principals"), PathStep::Entry(place)];
        let (line, column) = locate(&policy.text, &path);
        let message = format!("no rule is for `{}`: it may do nothing", principal.name.0);
        Some(PolicyError { line, column, message })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(principals: &str, rules: &str) -> Vec<String> {
        let text = format!(
            "version: 1\nauthenticate: {{api_keys: {{file: k}}}}\nprincipals: {principals}\n\
             rules: {rules}\n"
        );
        warnings(&Policy::parse(&text).unwrap()).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn probable_mistake_is_found_at_its_place() {
        let work = "[{principals: ['*'], streams: [s], consumers: [c], verbs: [work]}]";
        let found =
            of("[{name: a, match: ['key:*']}, {name: b, match: ['dns:*', 'key:b?']}]", work);
        let [hidden] = &found[..] else { panic!("{found:?}") };
        assert!(hidden.starts_with("3:70: `key:b?` never counts"), "{hidden}");

        let fetch = "[{principals: [a], streams: ['s*'], consumers: [c], verbs: [fetch]}";
        let one = "[{name: a, match: [x]}]";
        let found = of(one, &format!("{fetch}]"));
        let [alone] = &found[..] else { panic!("{found:?}") };
        assert!(alone.starts_with("4:67: `a` may fetch here and not settle"), "{alone}");
        let settle = ", {principals: ['*'], streams: ['*'], consumers: [c], verbs: [settle]}]";
        assert!(of(one, &format!("{fetch}{settle}")).is_empty());

        let foreign = "[{name: a, match: ['jwt:corp/*', 'jwt:*', 'k8s:a/b']}]";
        let found = of(foreign, work);
        let [corp, account] = &found[..] else { panic!("{found:?}") };
        assert!(
            corp.starts_with("3:32: `jwt:corp/*` never counts: there is no issuer `corp`"),
            "{corp}"
        );
        assert!(account.contains("no issuer `kubernetes`"), "{account}");

        let idle = "[{name: a, match: [x]}, {name: b, match: [y]}]";
        let found = of(idle, &work.replace("'*'", "a"));
        let [nothing] = &found[..] else { panic!("{found:?}") };
        assert!(nothing.starts_with("3:37: no rule is for `b`"), "{nothing}");
    }

    #[test]
    fn policy_of_certificates_alone_is_no_mistake_and_capitals_in_it_are() {
        let of = |pattern: &str| {
            let text = format!(
                "version: 1\nprincipals: [{{name: a, match: ['{pattern}']}}]\n\
                 rules: [{{principals: [a], streams: [s], consumers: [c], verbs: [work]}}]"
            );
            let found = warnings(&Policy::parse(&text).unwrap());
            found.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert!(of("spiffe://prod/*").is_empty() && of("dns:*.example").is_empty());
        let [nobody] = &of("key:*")[..] else { panic!() };
        assert!(nobody.starts_with("1:1: nothing in `authenticate` identifies"), "{nobody}");
        let found = of("dns:*.Example");
        let [capital] = &found[..] else { panic!("{found:?}") };
        assert!(capital.starts_with("2:32: `dns:*.Example` never counts"), "{capital}");
    }

    #[test]
    fn open_authentication_is_named() {
        let text = "version: 1\nauthenticate:\n  accept_anonymous_tokens: true\n\
                    principals: [{name: a, match: [anonymous]}]\n\
                    rules: [{principals: [a], streams: [s], consumers: [c], verbs: [work]}]";
        let found = warnings(&Policy::parse(text).unwrap());
        let places: Vec<_> = found.iter().map(|warning| (warning.line, warning.column)).collect();
        assert_eq!(places, [(1, 1), (3, 28)]);
    }

    #[test]
    fn number_of_warnings_is_bounded() {
        let many: Vec<_> = (0..200).map(|name| format!("{{name: p{name}, match: [x]}}")).collect();
        assert_eq!(
            of(
                &format!("[{}]", many.join(", ")),
                "[{principals: [p0], streams: [s], consumers: [c], verbs: [work]}]"
            )
            .len(),
            MAX_WARNINGS
        );
    }
}
