//! Asks whether a caller may settle each token of a call, and has the audit write what deserves a line. Decides
//! no right itself: `access` does.

use std::{collections::BTreeSet, sync::Arc};

use super::wire::SettleResult;
use crate::{
    access::{KnownCaller, Settler, Verb},
    api_error::ApiError,
    audit::AuditedCall,
    broker::{AckSubject, Broker, ConsumerName},
    lessor::Action,
    reason::Reason,
    token::Claims,
};

/// The tokens of one call, as far as the audit must know them after the call.
#[derive(Default)]
pub(super) struct AuditedTokens {
    /// Tokens of other principals, which the caller may settle.
    foreign: Vec<ForeignToken>,
    /// Each verb and consumer that was allowed: one line is enough for all their tokens.
    allowed: BTreeSet<(&'static str, Option<ConsumerName>)>,
}

struct ForeignToken {
    index: usize,
    consumer: Option<ConsumerName>,
    /// The principal of the token.
    owner: String,
}

impl AuditedTokens {
    /// The principal that the lease of a token must belong to, if the caller may do this. `None`: any.
    pub(super) fn authorize<B: Broker>(
        &mut self,
        index: usize,
        call: &AuditedCall<'_>,
        settler: &Settler,
        claims: &Claims<'_>,
        action: &Action,
    ) -> Result<Option<Arc<str>>, ApiError> {
        if settler.rights().policy().is_none() && !call.audit.has_all() {
            return Ok(None);
        }
        let verb = verb(action);
        let ack = AckSubject((*claims.ack_subject).into());
        let consumer = B::delivery_of(&ack).map(|(name, _)| name);
        let names = names(consumer.as_ref());
        let by = settler.may(verb, names, &claims.principal).inspect_err(|denied| {
            call.denied(denied, names);
        })?;
        if call.audit.has_all() && self.allowed.insert((verb.name(), consumer.clone())) {
            let rule = names.and_then(|it| settler.rights().rule_line(settler.caller(), verb, it));
            call.allowed(settler.caller(), verb, names, rule);
        }
        if by.is_none() && settler.rights().policy().is_some() {
            let owner = claims.principal.to_string();
            self.foreign.push(ForeignToken { index, consumer, owner });
        }
        Ok(by)
    }

    /// Writes the lines that depend on the results of the call.
    pub(super) fn write(
        &self,
        call: &AuditedCall<'_>,
        caller: &KnownCaller,
        wanted: &[(String, Action)],
        results: &[SettleResult],
    ) {
        for ForeignToken { index, consumer, owner } in &self.foreign {
            if results[*index].is_ok() {
                let verb = verb(&wanted[*index].1);
                call.foreign_settle(caller, verb, names(consumer.as_ref()), owner);
            }
        }
        for ((_, action), result) in wanted.iter().zip(results) {
            // A refusal by the policy has its line already.
            if let Err(refused) = result
                && refused.reason() == Reason::NotAllowed
                && !matches!(refused, ApiError::NotAllowed(_))
            {
                call.foreign_lease(caller, verb(action));
            }
        }
    }
}

fn verb(action: &Action) -> Verb {
    match action {
        Action::Ack | Action::Nak(_) | Action::Term(_) => Verb::Settle,
        Action::Extend(_) => Verb::Extend,
    }
}

fn names(consumer: Option<&ConsumerName>) -> Option<(&str, &str)> {
    consumer.map(|name| (&*name.stream, &*name.consumer))
}
