//! Why a policy allows or denies: the principal of an identity, and the line of the rule that decides.

use std::fmt;

use super::{
    compiled::Policy,
    identity::Identity,
    pattern::Pattern,
    place::{PathStep, locate},
    verbs::{Verb, VerbSet},
};

/// A question about a consumer.
#[derive(Debug, Clone)]
pub struct AskedRight {
    /// The kind of call.
    pub verb: Verb,
    /// The stream.
    pub stream: String,
    /// The consumer.
    pub consumer: String,
}

/// The answer, in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explanation {
    /// Whether the call is allowed. Without a question: whether the identity has a principal.
    pub is_allowed: bool,
    lines: Vec<(&'static str, String)>,
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, value) in &self.lines {
            writeln!(f, "{name:9}  {value}")?;
        }
        Ok(())
    }
}

impl Policy {
    /// Explains what an identity may do. Without a question, lists the rules that are for its principal.
    pub fn explain(&self, identity: &Identity, question: Option<&AskedRight>) -> Explanation {
        let mut lines = vec![("identity", identity.to_string())];
        lines.extend(self.issuer_of(identity).map(|issuer| ("issuer", issuer)));
        let Some(principal) = self.principal_of(identity) else {
            lines.push(("principal", "none: no pattern of the file matches".to_owned()));
            if question.is_some() {
                lines.push(("denied", "an identity without a principal may do nothing".to_owned()));
            }
            return Explanation { is_allowed: false, lines };
        };
        let line = self.line_of("principals", principal.place);
        lines.push(("principal", format!("{} (line {line})", principal.name)));
        let is_allowed = match question {
            None => {
                lines.extend(self.rights_of(&principal.name));
                true
            }
            Some(AskedRight { verb, stream, consumer }) => {
                let asked = format!("{} {stream}/{consumer}", verb.name());
                // Each of them alone allows it. The first in the file is named.
                let rule = self.rules_for(&principal.name, *verb, stream, consumer).min();
                match rule {
                    Some(rule) => {
                        let line = self.line_of("rules", rule);
                        lines.push(("allowed", format!("{asked}, by the rule in line {line}")));
                    }
                    None => lines.push(("denied", format!("{asked}: no rule allows it"))),
                }
                rule.is_some()
            }
        };
        Explanation { is_allowed, lines }
    }

    /// The verbs that a principal has at some consumer.
    pub(super) fn verbs_of(&self, principal: &str) -> VerbSet {
        let rules = self.document.rules.0.iter().filter(|rule| rule.is_for(principal));
        rules.fold(VerbSet::NONE, |all, rule| all.with(rule.all_verbs()))
    }

    /// Whether one rule allows this to a principal for all streams and all consumers.
    pub(super) fn allows_everywhere(&self, principal: &str, verb: Verb) -> bool {
        self.document.rules.0.iter().any(|rule| {
            rule.is_for(principal)
                && rule.all_verbs().has(verb)
                && rule.streams.0.iter().any(Pattern::is_any)
                && rule.consumers.0.iter().any(Pattern::is_any)
        })
    }

    /// The line of the first rule that allows this to a principal.
    pub(super) fn rule_line(
        &self,
        principal: &str,
        verb: Verb,
        (stream, consumer): (&str, &str),
    ) -> Option<usize> {
        let rule = self.rules_for(principal, verb, stream, consumer).min()?;
        Some(self.line_of("rules", rule))
    }

    /// The issuer whose tokens give this identity, and its keys, in words. `None`: no token gives it.
    fn issuer_of(&self, identity: &Identity) -> Option<String> {
        let name = identity.issuer()?;
        let issuer = self.issuers().iter().find(|issuer| *issuer.name == *name);
        let missing =
            || format!("none: `authenticate` has no issuer `{name}`, so nobody has this identity");
        Some(issuer.map_or_else(missing, |issuer| issuer.in_words()))
    }

    /// The line of an entry of a list of the file.
    pub(super) fn line_of(&self, list: &str, place: usize) -> usize {
        locate(&self.text, &[PathStep::Key(list), PathStep::Entry(place)]).0
    }

    /// The rules for a principal, in words.
    fn rights_of(&self, principal: &str) -> Vec<(&'static str, String)> {
        let rules = self.document.rules.0.iter().enumerate();
        let rules = rules.filter(|(_, rule)| rule.is_for(principal));
        let mut rights: Vec<_> = rules
            .map(|(place, rule)| {
                ("may", format!("{} (line {})", rule.rights(), self.line_of("rules", place)))
            })
            .collect();
        if rights.is_empty() {
            rights.push(("may", "nothing: no rule is for this principal".to_owned()));
        }
        rights
    }
}
