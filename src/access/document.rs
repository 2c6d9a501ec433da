//! The policy file: its grammar, and the checks that need more than one of its entries.
//!
//! ```text
//!  file      = version: 1, [authenticate], [limits], principals: 1..1000, [rules: 1..10000]
//!  authenticate = any of anonymous, accept_anonymous_tokens, api_keys, jwt, kubernetes: see `issuer`
//!  principal = name, match: 1..100 patterns, [limits]
//!  rule      = principals: names or ["*"], streams, consumers: patterns, verbs
//! ```
//! An unknown key is a mistake, and so is a key that stands twice.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::{
    fields::{FilePath, List, Name, Number, Version, Whom},
    issuer::{self, Issuer, JwtEntry, KubernetesEntry},
    pattern::Pattern,
    place::{PathStep, PolicyError},
    verbs::VerbSet,
};

/// Largest file, in bytes.
const MAX_POLICY_BYTES: usize = 1 << 20;
/// Most entries of all lists together. An alias repeats a list, so a small file can have many.
const MAX_POLICY_ENTRIES: usize = 200_000;
/// Most entries of one list in a rule.
const MAX_LIST: usize = 10_000;
/// Most of each limit, except the calls in a second.
const MAX_LIMIT: u64 = 100_000_000;

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Document {
    #[serde(rename = "version")]
    _version: Version,
    #[serde(default)]
    pub(super) authenticate: Authenticate,
    /// For each principal without limits of its own.
    #[serde(default)]
    pub(super) limits: LimitsEntry,
    pub(super) principals: List<PrincipalEntry, 1, 1000>,
    #[serde(default = "no_rules")]
    pub(super) rules: List<RuleEntry, 0, 10_000>,
}

fn no_rules() -> List<RuleEntry, 0, 10_000> {
    List(Vec::new())
}

/// The credentials that are accepted.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Authenticate {
    /// Whether a caller without a credential has the identity `anonymous`. If not, it is refused.
    #[serde(default)]
    pub anonymous: bool,
    /// Whether each principal may settle tokens that were made before there was a policy.
    #[serde(default)]
    pub accept_anonymous_tokens: bool,
    #[serde(default)]
    api_keys: Option<ApiKeysEntry>,
    #[serde(default)]
    jwt: Option<List<JwtEntry, 1, 16>>,
    #[serde(default)]
    kubernetes: Option<KubernetesEntry>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct ApiKeysEntry {
    file: FilePath,
}

impl Authenticate {
    /// The file with the API keys. A relative path counts from the folder of the policy file.
    pub fn api_keys_file(&self, policy_file: &Path) -> Option<PathBuf> {
        let folder = policy_file.parent().unwrap_or(Path::new(""));
        self.api_keys.as_ref().map(|entry| folder.join(&*entry.file.0))
    }

    /// Whether a credential of some kind is accepted.
    pub fn identifies(&self) -> bool {
        self.api_keys.is_some() || self.jwt.is_some() || self.kubernetes.is_some()
    }

    /// The issuers whose tokens are accepted.
    pub(super) fn issuers(&self) -> Vec<Issuer> {
        issuer::issuers(self.jwt_entries(), self.kubernetes.as_ref())
    }

    fn jwt_entries(&self) -> &[JwtEntry] {
        self.jwt.as_ref().map_or(&[], |list| &list.0)
    }

    fn check(&self, text: &str) -> Result<(), PolicyError> {
        let mistake = issuer::mistake(self.jwt_entries(), self.kubernetes.as_ref());
        let Some((entry, fields, message)) = mistake else { return Ok(()) };
        let mut path = vec![PathStep::Key("authenticate")];
        match entry {
            Some(place) => path.extend([PathStep::Key("jwt"), PathStep::Entry(place)]),
            None => path.push(PathStep::Key("kubernetes")),
        }
        path.extend(fields.into_iter().map(PathStep::Key));
        Err(PolicyError::at(text, &path, message))
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PrincipalEntry {
    pub(super) name: Name,
    #[serde(rename = "match")]
    pub(super) patterns: List<Pattern, 1, 100>,
    #[serde(default)]
    pub(super) limits: Option<LimitsEntry>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LimitsEntry {
    #[serde(default)]
    max_leases: Option<Number<MAX_LIMIT>>,
    #[serde(default)]
    max_waiters: Option<Number<MAX_LIMIT>>,
    #[serde(default)]
    max_calls: Option<Number<MAX_LIMIT>>,
    #[serde(default)]
    calls_per_second: Option<Number<1_000_000>>,
    #[serde(default)]
    burst: Option<Number<MAX_LIMIT>>,
}

/// The limits of one principal at one replica. `None` is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PrincipalLimits {
    /// Leases held at once.
    pub max_leases: Option<u64>,
    /// Fetch calls open at once.
    pub max_waiters: Option<u64>,
    /// Calls under way at once.
    pub max_calls: Option<u64>,
    /// Calls in a second, and the calls that may come at once.
    pub rate: Option<(u64, u64)>,
}

impl LimitsEntry {
    fn check(&self, text: &str, path: &[PathStep]) -> Result<(), PolicyError> {
        if self.burst.is_some() && self.calls_per_second.is_none() {
            return Err(PolicyError::at(text, path, "`burst` needs `calls_per_second`"));
        }
        Ok(())
    }

    pub(super) fn meaning(&self) -> PrincipalLimits {
        let burst = self.burst.map(|burst| burst.0);
        PrincipalLimits {
            max_leases: self.max_leases.map(|most| most.0),
            max_waiters: self.max_waiters.map(|most| most.0),
            max_calls: self.max_calls.map(|most| most.0),
            rate: self.calls_per_second.map(|rate| (rate.0, burst.unwrap_or(rate.0))),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RuleEntry {
    pub(super) principals: List<Whom, 1, MAX_LIST>,
    pub(super) streams: List<Pattern, 1, MAX_LIST>,
    pub(super) consumers: List<Pattern, 1, MAX_LIST>,
    pub(super) verbs: List<VerbSet, 1, 16>,
}

impl RuleEntry {
    /// The rule in one line.
    pub(super) fn in_words(&self) -> String {
        let principals = self.principals.0.iter().map(|whom| match whom {
            Whom::Everybody => "*",
            Whom::Named(name) => name,
        });
        let principals = principals.collect::<Vec<_>>().join(", ");
        format!("{principals} may {}", self.rights())
    }

    /// The verbs, the streams and the consumers of the rule, in one line.
    pub(super) fn rights(&self) -> String {
        let names = |patterns: &[Pattern]| {
            patterns.iter().map(Pattern::as_str).collect::<Vec<_>>().join(", ")
        };
        let (streams, consumers) = (names(&self.streams.0), names(&self.consumers.0));
        format!("{} on {streams} / {consumers}", self.all_verbs())
    }

    /// All verbs of the rule.
    pub(super) fn all_verbs(&self) -> VerbSet {
        self.verbs.0.iter().fold(VerbSet::NONE, |all, verbs| all.with(*verbs))
    }

    /// Whether the rule is for this principal.
    pub(super) fn is_for(&self, principal: &str) -> bool {
        self.principals.0.iter().any(|whom| match whom {
            Whom::Everybody => true,
            Whom::Named(name) => **name == *principal,
        })
    }

    fn entries(&self) -> usize {
        self.principals.0.len() + self.streams.0.len() + self.consumers.0.len() + self.verbs.0.len()
    }
}

impl Document {
    /// Reads a policy file.
    ///
    /// # Errors
    /// The first mistake, with its place.
    pub(super) fn parse(text: &str) -> Result<Self, PolicyError> {
        if text.len() > MAX_POLICY_BYTES {
            return Err(PolicyError::at("", &[], "the file is larger than 1 MiB"));
        }
        let document: Self =
            yaml_serde::from_str(text).map_err(|error| PolicyError::of_yaml(&error))?;
        document.check(text)?;
        Ok(document)
    }

    fn check(&self, text: &str) -> Result<(), PolicyError> {
        let patterns = self.principals.0.iter().map(|principal| principal.patterns.0.len());
        let entries = self.rules.0.iter().map(RuleEntry::entries);
        if patterns.chain(entries).sum::<usize>() > MAX_POLICY_ENTRIES {
            let message = format!("all lists together have more than {MAX_POLICY_ENTRIES} entries");
            return Err(PolicyError::at(text, &[], message));
        }
        self.limits.check(text, &[PathStep::Key("limits")])?;
        self.authenticate.check(text)?;
        let mut names = HashSet::new();
        for (index, principal) in self.principals.0.iter().enumerate() {
            if !names.insert(&*principal.name.0) {
                let path =
                    [PathStep::Key("principals"), PathStep::Entry(index), PathStep::Key("name")];
                let message = format!("a second principal has the name `{}`", principal.name.0);
                return Err(PolicyError::at(text, &path, message));
            }
            let path =
                [PathStep::Key("principals"), PathStep::Entry(index), PathStep::Key("limits")];
            principal.limits.iter().try_for_each(|limits| limits.check(text, &path))?;
        }
        for (index, rule) in self.rules.0.iter().enumerate() {
            for (place, whom) in rule.principals.0.iter().enumerate() {
                let message = match whom {
                    Whom::Everybody if rule.principals.0.len() > 1 => {
                        "\"*\" must be the only entry of its list".to_owned()
                    }
                    Whom::Named(name) if !names.contains(&**name) => {
                        format!("there is no principal with the name `{name}`")
                    }
                    Whom::Everybody | Whom::Named(_) => continue,
                };
                let path = [
                    PathStep::Key("rules"),
                    PathStep::Entry(index),
                    PathStep::Key("principals"),
                    PathStep::Entry(place),
                ];
                return Err(PolicyError::at(text, &path, message));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A file with these principals and these rules.
    fn file(principals: &str, rules: &str) -> String {
        format!("version: 1\nprincipals: {principals}\nrules: {rules}\n")
    }

    #[test]
    fn each_mistake_has_its_line_and_column() {
        let one = "[{name: a, match: [x]}]";
        let rule = |changed: &str| {
            file(one, &format!("\n- {{principals: [a], streams: [s], consumers: [c], {changed}}}"))
        };
        let mut wrong = Vec::new();
        let many = format!("[{}]", "{name: a, match: [x]}, ".repeat(1001));
        for (text, place, said) in [
            (String::new(), (1, 1), "missing field `version`"),
            ("version: 2".to_owned(), (1, 10), "`2` is no version that is known: it must be 1"),
            ("version: one".to_owned(), (1, 10), "it must be 1"),
            ("version: 1\nversion: 1".to_owned(), (1, 1), "duplicate field `version`"),
            ("version: 1\nprincipal: []".to_owned(), (2, 1), "unknown field `principal`"),
            ("version: 1".to_owned(), (1, 1), "missing field `principals`"),
            (file("[]", "[]"), (2, 13), "fewer than 1 entries"),
            (file("{}", "[]"), (2, 13), "expected a list"),
            (file("[{name: A, match: [x]}]", "[]"), (2, 21), "`A` is no name"),
            (file("[{name: '', match: [x]}]", "[]"), (2, 21), "`` is no name"),
            (file("[{name: a, match: []}]", "[]"), (2, 31), "fewer than 1 entries"),
            (file("[{name: a, match: x}]", "[]"), (2, 31), "expected a list"),
            (file("[{name: a, match: [' ']}]", "[]"), (2, 32), "no space"),
            (file("[{name: a, match: ['']}]", "[]"), (2, 32), "must not be empty"),
            (file("[{name: a, match: [[x]]}]", "[]"), (2, 32), "expected a pattern"),
            (file("[{name: a, match: [*]}]", "[]"), (2, 33), "quote a pattern"),
            (file("[{name: a, match: [*x]}]", "[]"), (2, 32), "quote a pattern"),
            (
                file("[{name: a, match: [x]}, {match: [y], name: a}]", "[]"),
                (2, 56),
                "a second principal",
            ),
            (file("[{name: a, match: [x], limits: {a: 1}}]", "[]"), (2, 45), "unknown field `a`"),
            (
                file("[{name: a, match: [x], limits: {max_calls: 0}}]", "[]"),
                (2, 56),
                "must be a whole number from 1",
            ),
            (
                file("[{name: a, match: [x], limits: {max_calls: -1}}]", "[]"),
                (2, 56),
                "expected a whole number",
            ),
            (
                file("[{name: a, match: [x], limits: {calls_per_second: 1000001}}]", "[]"),
                (2, 63),
                "from 1 to 1000000",
            ),
            (
                file("[{name: a, match: [x], limits: {burst: 5}}]", "[]"),
                (2, 44),
                "needs `calls_per_second`",
            ),
            ("version: 1\nlimits: {a: 1}".to_owned(), (2, 10), "unknown field `a`"),
            (
                file("[{name: a, match: [x]}]\nlimits: {burst: 5}", "[]"),
                (3, 9),
                "needs `calls_per_second`",
            ),
            (file(&many, "[]"), (2, 13), "more than 1000 entries"),
            (rule("verbs: [eat]"), (4, 59), "`eat` is no verb"),
            (rule("verbs: []"), (4, 58), "fewer than 1 entries"),
            (rule("verb: [work]"), (4, 51), "unknown field `verb`"),
            (
                rule("verbs: [work]").replace("[a]", "[b]"),
                (4, 17),
                "no principal with the name `b`",
            ),
            (rule("verbs: [work]").replace("[a]", "['a*']"), (4, 17), "a rule names principals"),
            (
                rule("verbs: [work]").replace("principals: [a]", "principals: [a, '*']"),
                (4, 20),
                "the only entry",
            ),
            (
                "version: 1\nprincipals:\n- name: a\n  match: [x".to_owned(),
                (5, 1),
                "did not find expected",
            ),
            ("version: 1\n\tprincipals: []".to_owned(), (2, 1), "found a tab character"),
            ("---\nversion: 1\n---\nversion: 1".to_owned(), (2, 1), "missing field `principals`"),
            ("a".repeat(MAX_POLICY_BYTES + 1), (1, 1), "larger than 1 MiB"),
        ] {
            let error = Document::parse(&text).unwrap_err();
            let (found, message) = ((error.line, error.column), &error.message);
            if found != place || !message.contains(said) || message.contains(" at line ") {
                wrong.push(format!("{said}: {error}"));
            }
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
    }

    #[test]
    fn each_mistake_about_issuers_has_its_line_and_column() {
        let keys = "keys: {url: https://login.example/keys}";
        let good =
            format!("- {{name: corp, issuer: https://login.example, audiences: [a], {keys}}}");
        let file = |entries: &str| {
            format!(
                "version: 1\nauthenticate:\n  jwt:\n{entries}\nprincipals: [{{name: a, match: [x]}}]\n"
            )
        };
        let with = |old: &str, new: &str| {
            assert!(good.contains(old), "{old}");
            file(&format!("  {}", good.replace(old, new)))
        };
        let kubernetes = |entry: &str| {
            with("", "").replace("\nprincipals", &format!("\n  kubernetes: {entry}\nprincipals"))
        };
        assert!(Document::parse(&with("", "")).is_ok());
        let mut wrong = Vec::new();
        for (text, place, said) in [
            (with("corp", "Corp"), (4, 12), "`Corp` is no name"),
            (with("corp", "kubernetes"), (4, 12), "`kubernetes` is taken"),
            (with("[a]", "[]"), (4, 60), "fewer than 1 entries"),
            (with(", audiences: [a]", ""), (4, 5), "missing field `audiences`"),
            (with("[a]", "[a], audience: x"), (4, 65), "unknown field `audience`"),
            (with("[a]", "[a], algorithms: [HS256]"), (4, 78), "`HS256` is no algorithm"),
            (with("[a]", "[a], algorithms: [none]"), (4, 78), "`none` is no algorithm"),
            (with("[a]", "[a], clock_skew: 301s"), (4, 77), "`301s` is no time from 0s to 5m"),
            (with("[a]", "[a], clock_skew: 60"), (4, 77), "`60` is no time"),
            (with("[a]", "[a], max_lifetime: 0s"), (4, 79), "is no time from 1s"),
            (
                with("https://login.example/keys", "http://login.example/keys"),
                (4, 77),
                "only for loopback",
            ),
            (with("url: https://login.example/keys", "x: 1"), (4, 72), "unknown field `x`"),
            (with("{url: https://login.example/keys}", "{}"), (4, 71), "needs one of `file`"),
            (with("{url", "{file: f, url"), (4, 71), "needs one of `file`"),
            (
                with("{url: https://login.example/keys}", "{file: f, ca_file: c}"),
                (4, 90),
                "`ca_file` is for `url`",
            ),
            (
                with("https://login.example,", "login.example,")
                    .replace("url: https://login.example/keys", "discovery: true"),
                (4, 75),
                "`issuer` is no such URL",
            ),
            (
                file(&format!("  {good}\n  {}", good.replace("https://login.example,", "i,"))),
                (5, 12),
                "a second issuer",
            ),
            (
                file(&format!("  {good}\n  {}", good.replace("corp", "b"))),
                (5, 23),
                "a second entry is for",
            ),
            (
                kubernetes(&format!("{{issuer: https://login.example, audiences: [a], {keys}}}")),
                (5, 24),
                "a second entry is for",
            ),
            (kubernetes("{issuer: i, audiences: [a], keys: {}}"), (5, 49), "needs one of `file`"),
            (
                kubernetes(&format!("{{issuer: i, audiences: [a], subject: x, {keys}}}")),
                (5, 43),
                "unknown field `subject`",
            ),
        ] {
            let error = Document::parse(&text).unwrap_err();
            let (found, message) = ((error.line, error.column), &error.message);
            if found != place || !message.contains(said) || message.contains(" at line ") {
                wrong.push(format!("{said} at {place:?}: {error}"));
            }
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
    }

    #[test]
    fn repeated_alias_is_bounded() {
        let names: Vec<_> = (0..900).map(|name| format!("{{name: p{name}, match: [x]}}")).collect();
        let all: Vec<_> = (0..900).map(|name| format!("p{name}")).collect();
        let first = format!(
            "{{principals: &all [{}], streams: [s], consumers: [c], verbs: [work]}}",
            all.join(", ")
        );
        let rest = ", {principals: *all, streams: [s], consumers: [c], verbs: [work]}".repeat(800);
        let text = file(&format!("[{}]", names.join(", ")), &format!("[{first}{rest}]"));
        let error = Document::parse(&text).unwrap_err();
        assert!(error.message.contains("more than 200000 entries"), "{error}");
    }

    #[test]
    fn names_that_yaml_reads_as_other_types_are_texts() {
        let rules =
            "[{principals: [1], streams: [1.5, true], consumers: [null, ~], verbs: [work]}]";
        let document = Document::parse(&file("[{name: 1, match: [no]}]", rules)).unwrap();
        let rule = &document.rules.0[0];
        let texts = rule.streams.0.iter().chain(&rule.consumers.0).map(Pattern::as_str);
        assert_eq!(texts.collect::<Vec<_>>(), ["1.5", "true", "null", "~"]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]

        #[test]
        fn any_bytes_are_read_without_a_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..300), cut in any::<prop::sample::Index>(),
            at in any::<prop::sample::Index>(), byte: u8,
        ) {
            let _ = Document::parse(&String::from_utf8_lossy(&bytes));
            // A good file with one changed byte, or without its end.
            let good = file(
                "\n- name: a\n  match: [\"key:*\", &x 'b']\n  limits: {max_calls: 5}",
                "[{principals: [a], streams: [*x], consumers: [c], verbs: [work]}]",
            );
            prop_assert!(Document::parse(&good).is_ok());
            let _ = Document::parse(&good[..cut.index(good.len())]);
            let mut changed = good.into_bytes();
            let at = at.index(changed.len());
            changed[at] = byte;
            if let Err(error) = Document::parse(&String::from_utf8_lossy(&changed)) {
                prop_assert!(error.line > 0 && error.column > 0, "{}", error);
            }
        }
    }
}
