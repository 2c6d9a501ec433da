//! A policy in the form in which it is asked: principals by identity, and rules by principal and stream.

use std::{collections::HashMap, sync::Arc};

use super::{
    api_key::{hex, sha256},
    document::{Authenticate, Document, PrincipalLimits, RuleEntry},
    fields::Whom,
    identity::Identity,
    issuer::Issuer,
    pattern::Pattern,
    place::PolicyError,
    verbs::{Verb, VerbSet},
};

/// A policy file without a mistake.
#[derive(Debug)]
pub struct Policy {
    pub(super) text: Box<str>,
    pub(super) document: Document,
    issuers: Vec<Issuer>,
    principals: Vec<Arc<Principal>>,
    /// The places of principals, by their names.
    places: HashMap<Arc<str>, usize>,
    /// The first principal that names an identity in full, by that identity.
    literal: HashMap<Box<str>, usize>,
    /// Other patterns, in their order, each with its principal.
    patterns: Vec<(Pattern, usize)>,
    /// The verbs of each rule.
    verbs: Vec<VerbSet>,
    /// The rules that name a principal, by its name.
    named: HashMap<Box<str>, RuleIndex>,
    everybody: RuleIndex,
    digest: [u8; 8],
}

/// A principal: one account, under which any number of identities may call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Principal {
    /// The name in logs, in tokens and in rules.
    pub name: Arc<str>,
    /// The limits.
    pub limits: PrincipalLimits,
    /// The place in the list of principals.
    pub(super) place: usize,
}

/// Rules by their places, found by a stream.
#[derive(Debug, Default)]
struct RuleIndex {
    by_stream: HashMap<Box<str>, Vec<usize>>,
    /// Rules with a pattern of streams.
    others: Vec<usize>,
}

impl RuleIndex {
    fn add(&mut self, place: usize, rule: &RuleEntry) {
        let mut has_pattern = false;
        for stream in &rule.streams.0 {
            match stream.literal() {
                Some(stream) => self.by_stream.entry(stream.into()).or_default().push(place),
                None => has_pattern = true,
            }
        }
        if has_pattern {
            self.others.push(place);
        }
    }

    fn candidates(&self, stream: &str) -> impl Iterator<Item = usize> {
        self.by_stream.get(stream).into_iter().flatten().chain(&self.others).copied()
    }
}

impl Policy {
    /// Reads a policy file.
    ///
    /// # Errors
    /// The first mistake, with its place.
    pub fn parse(text: &str) -> Result<Self, PolicyError> {
        let document = Document::parse(text)?;
        let (mut principals, mut literal, mut patterns) = (Vec::new(), HashMap::new(), Vec::new());
        let mut places = HashMap::new();
        for (place, entry) in document.principals.0.iter().enumerate() {
            let limits = entry.limits.as_ref().unwrap_or(&document.limits).meaning();
            let name: Arc<str> = Arc::from(&*entry.name.0);
            places.insert(name.clone(), place);
            principals.push(Arc::new(Principal { name, limits, place }));
            for pattern in &entry.patterns.0 {
                match pattern.literal() {
                    Some(identity) => drop(literal.entry(identity.into()).or_insert(place)),
                    None => patterns.push((pattern.clone(), place)),
                }
            }
        }
        let (mut named, mut everybody) = (HashMap::new(), RuleIndex::default());
        for (place, rule) in document.rules.0.iter().enumerate() {
            for whom in &rule.principals.0 {
                match whom {
                    Whom::Everybody => everybody.add(place, rule),
                    Whom::Named(name) => {
                        let index: &mut RuleIndex = named.entry(name.clone()).or_default();
                        index.add(place, rule);
                    }
                }
            }
        }
        let verbs = document.rules.0.iter().map(RuleEntry::all_verbs).collect();
        let mut digest = [0; 8];
        digest.copy_from_slice(&sha256(text.as_bytes())[..8]);
        let (text, issuers) = (text.into(), document.authenticate.issuers());
        Ok(Self {
            text,
            document,
            issuers,
            principals,
            places,
            literal,
            patterns,
            verbs,
            named,
            everybody,
            digest,
        })
    }

    /// The credentials that are accepted.
    pub fn authenticate(&self) -> &Authenticate {
        &self.document.authenticate
    }

    /// The issuers whose tokens are accepted, in their order.
    pub fn issuers(&self) -> &[Issuer] {
        &self.issuers
    }

    /// The principal of an identity: the first in the file with a pattern that matches.
    pub fn principal_of(&self, identity: &Identity) -> Option<&Arc<Principal>> {
        let named = self.literal.get(identity.as_str()).copied();
        let matches = |(pattern, _): &&(Pattern, usize)| pattern.matches(identity.as_str());
        let matched = self.patterns.iter().find(matches).map(|(_, place)| *place);
        named.into_iter().chain(matched).min().map(|place| &self.principals[place])
    }

    /// Whether the principal of this name may do this with the consumer.
    pub fn allows(&self, principal: &str, verb: Verb, stream: &str, consumer: &str) -> bool {
        self.rules_for(principal, verb, stream, consumer).next().is_some()
    }

    /// The principal of this name.
    pub fn principal(&self, name: &str) -> Option<&Principal> {
        self.places.get(name).map(|place| &*self.principals[*place])
    }

    /// The numbers of principals and of rules.
    pub fn counts(&self) -> (usize, usize) {
        (self.principals.len(), self.document.rules.0.len())
    }

    /// Tells one policy file from another: the beginning of its SHA-256, in hexadecimal digits.
    pub fn digest(&self) -> String {
        hex(&self.digest)
    }

    /// The same as bytes.
    pub fn digest_bytes(&self) -> [u8; 8] {
        self.digest
    }

    /// The places of the rules that allow this, in no order.
    pub(super) fn rules_for(
        &self,
        principal: &str,
        verb: Verb,
        stream: &str,
        consumer: &str,
    ) -> impl Iterator<Item = usize> {
        let named = self.named.get(principal);
        let candidates = named.into_iter().flat_map(|index| index.candidates(stream));
        let all = candidates.chain(self.everybody.candidates(stream));
        all.filter(move |place| self.allowed_by(*place, verb, stream, consumer))
    }

    fn allowed_by(&self, place: usize, verb: Verb, stream: &str, consumer: &str) -> bool {
        let rule = &self.document.rules.0[place];
        self.verbs[place].has(verb)
            && rule.streams.0.iter().any(|pattern| pattern.matches(stream))
            && rule.consumers.0.iter().any(|pattern| pattern.matches(consumer))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::access::{AskedRight, IdentityKind};

    /// What a rule says, for the reference: principals, streams, consumers, verbs.
    type NaiveRule = (Vec<String>, Vec<String>, Vec<String>, Vec<&'static str>);

    fn some(text: &'static str) -> impl Strategy<Value = Vec<String>> {
        prop::collection::vec(text, 1..3)
    }

    fn rule() -> impl Strategy<Value = NaiveRule> {
        let whom = prop_oneof![
            Just(vec!["*".to_owned()]),
            prop::collection::vec("[pqr]".prop_map(String::from), 1..3)
        ];
        let verbs = prop::sample::subsequence(
            vec!["fetch", "settle", "extend", "settle-any", "inspect", "admin", "work"],
            1..4,
        );
        (whom, some("[ab*?]{1,3}"), some("[ab*?]{1,3}"), verbs)
    }

    fn quoted<T: AsRef<str>>(list: &[T]) -> String {
        let quoted = list.iter().map(|text| format!("'{}'", text.as_ref()));
        format!("[{}]", quoted.collect::<Vec<_>>().join(", "))
    }

    fn matches(pattern: &str, text: &str) -> bool {
        Pattern::parse(pattern).unwrap().matches(text)
    }

    fn includes(word: &str, verb: Verb) -> bool {
        match word {
            "work" => matches!(verb, Verb::Fetch | Verb::Settle | Verb::Extend),
            "settle-any" => matches!(verb, Verb::Settle | Verb::Extend | Verb::SettleAny),
            word => verb.name() == word,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        #[test]
        fn policy_decides_as_the_naive_reading_of_its_file(
            patterns in prop::collection::vec(some("key:[ab*?]{1,3}"), 3),
            rules in prop::collection::vec(rule(), 0..6),
            asked in prop::collection::vec(("[ab]{1,3}", "[ab]{1,2}", "[ab]{1,2}", 0_usize..6), 20),
        ) {
            let mut text = "version: 1\nprincipals:\n".to_owned();
            for (name, patterns) in ["p", "q", "r"].iter().zip(&patterns) {
                text += &format!("- {{name: {name}, match: {}}}\n", quoted(patterns));
            }
            text += if rules.is_empty() { "" } else { "rules:\n" };
            for (whom, streams, consumers, verbs) in &rules {
                let (whom, verbs) = (quoted(whom), quoted(verbs));
                let (streams, consumers) = (quoted(streams), quoted(consumers));
                text += &format!(
                    "- {{principals: {whom}, streams: {streams}, consumers: {consumers}, verbs: {verbs}}}\n"
                );
            }
            let policy = Policy::parse(&text).unwrap();
            for (name, stream, consumer, verb) in asked {
                let verb = Verb::ALL[verb];
                let identity = Identity::new(IdentityKind::ApiKey, &name).unwrap();
                let owner = patterns.iter().position(|patterns| {
                    patterns.iter().any(|pattern| matches(pattern, identity.as_str()))
                });
                let principal = policy.principal_of(&identity);
                prop_assert_eq!(principal.map(|principal| principal.place), owner);
                let by = owner.and_then(|owner| {
                    let owner = ["p", "q", "r"][owner];
                    rules.iter().position(|(whom, streams, consumers, verbs)| {
                        whom.iter().any(|whom| whom == "*" || whom == owner)
                            && streams.iter().any(|pattern| matches(pattern, &stream))
                            && consumers.iter().any(|pattern| matches(pattern, &consumer))
                            && verbs.iter().any(|word| includes(word, verb))
                    })
                });
                let allowed = principal.is_some_and(|principal| {
                    policy.allows(&principal.name, verb, &stream, &consumer)
                });
                prop_assert_eq!(allowed, by.is_some());
                let question = AskedRight { verb, stream, consumer };
                let explained = policy.explain(&identity, Some(&question));
                prop_assert_eq!(explained.is_allowed, allowed);
                // The three principals are in lines 3 to 5, so the first rule is in line 7.
                let line = by.map_or(String::new(), |rule| format!("the rule in line {}\n", 7 + rule));
                prop_assert!(explained.to_string().contains(&line), "{}", explained);
            }
        }
    }

    #[test]
    fn principal_without_limits_has_those_of_the_file() {
        let policy = Policy::parse(
            "{version: 1, limits: {max_calls: 9, calls_per_second: 5}, principals: [{name: a, match: \
             [x]}, {name: b, match: [y], limits: {max_leases: 3, calls_per_second: 7, burst: 70}}, \
             {name: c, match: [z], limits: {}}]}",
        );
        let policy = policy.unwrap();
        let limits = |name| policy.principal(name).unwrap().limits;
        let none = PrincipalLimits::default();
        let file = PrincipalLimits { max_calls: Some(9), rate: Some((5, 5)), ..none };
        assert_eq!(limits("a"), file);
        let own = PrincipalLimits { max_leases: Some(3), rate: Some((7, 70)), ..none };
        assert_eq!(limits("b"), own, "its own row is the whole row");
        assert_eq!(limits("c"), none);
        assert!(policy.principal("d").is_none());
    }

    #[test]
    fn unknown_principal_may_nothing_that_is_for_named_principals() {
        let policy = Policy::parse(
            "{version: 1, principals: [{name: a, match: [x]}], rules: [{principals: [a], streams: \
             ['*'], consumers: ['*'], verbs: [work]}]}",
        );
        let policy = policy.unwrap();
        assert!(policy.allows("a", Verb::Fetch, "s", "c"));
        assert!(!policy.allows("b", Verb::Fetch, "s", "c"));
        assert!(policy.principal_of(&Identity::anonymous()).is_none());
    }
}
