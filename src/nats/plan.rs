//! Which of many requests asks for an answer, which other requests that answer confirms, and the
//! result of each request. Pure: sends nothing and waits for nothing.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;

use super::delivery::consumer_of;
use crate::{
    broker::{BrokerError, ConsumerName, Denial},
    clock::{Deadline, Reading},
};

/// Most requests that one answer confirms. All of them are unconfirmed if the answer is lost.
const MAX_PER_CONFIRMATION: usize = 64;
/// So many refusals of one consumer, and no answer, show that all its requests are refused. Only the last refusals are
/// remembered, so some can be forgotten.
const TELLING_DENIALS: usize = 64;

/// One request to publish.
pub(super) struct Request {
    pub(super) subject: Box<str>,
    pub(super) payload: Bytes,
    /// As in [`crate::broker::AckPublish`].
    pub(super) confirm_group: Option<u32>,
    /// [`crate::broker::AckPublish::by`], on a machine that may be suspended before.
    pub(super) by: Option<Deadline>,
}

impl Request {
    /// A request that is answered by itself and has no deadline for its arrival.
    pub(super) fn new(subject: &str, payload: Bytes) -> Self {
        Self { subject: subject.into(), payload, confirm_group: None, by: None }
    }
}

/// The answer to a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum RequestAnswer {
    Replied(Bytes),
    /// Nobody listens on the subject: the request had no effect and never will.
    NoResponder,
}

/// Which requests ask for an answer.
pub(super) struct ConfirmPlan {
    /// For each request, the slot of the answer that confirms it, and whether this request asks for
    /// that answer.
    pub(super) slots: Vec<(usize, bool)>,
    /// The number of answers.
    pub(super) count: usize,
}

impl ConfirmPlan {
    /// The last request of a confirm group asks for an answer, for itself and for those before it.
    pub(super) fn of(requests: &[Request]) -> Self {
        let mut slots = vec![(0, true); requests.len()];
        let mut count = 0;
        // For each group, the slot that is filled now, from the last request to the first, and the
        // number of requests in the slot.
        let mut groups: Vec<(u32, usize, usize)> = Vec::new();
        for (index, request) in requests.iter().enumerate().rev() {
            let group = groups.iter_mut().find(|(group, ..)| Some(*group) == request.confirm_group);
            if let Some((_, slot, used)) = group {
                if *used < MAX_PER_CONFIRMATION {
                    *used += 1;
                    slots[index] = (*slot, false);
                    continue;
                }
                (*slot, *used) = (count, 1);
            } else if let Some(group) = request.confirm_group {
                groups.push((group, count, 1));
            }
            slots[index] = (count, true);
            count += 1;
        }
        Self { slots, count }
    }

    /// Consumers whose requests were all refused: many of them were, and none was answered.
    pub(super) fn refused_consumers(
        &self,
        requests: &[Request],
        answers: &[Option<(RequestAnswer, Reading)>],
        refused: &HashSet<String>,
    ) -> HashSet<ConsumerName> {
        let mut counts: HashMap<ConsumerName, usize> = HashMap::new();
        let mut served = HashSet::new();
        for (request, (slot, _)) in requests.iter().zip(&self.slots) {
            let Some(name) = consumer_of(&request.subject) else { continue };
            if answers.get(*slot).is_some_and(Option::is_some) {
                served.insert(name);
            } else if refused.contains(&*request.subject) {
                *counts.entry(name).or_default() += 1;
            }
        }
        let all_refused =
            |(name, count)| (count >= TELLING_DENIALS && !served.contains(&name)).then_some(name);
        counts.into_iter().filter_map(all_refused).collect()
    }

    /// The result of each request. The requests from index `sent` on never left.
    pub(super) fn results(
        &self,
        requests: &[Request],
        answers: &[Option<(RequestAnswer, Reading)>],
        sent: usize,
        refused: &HashSet<String>,
    ) -> Vec<Result<RequestAnswer, BrokerError>> {
        let consumers = match refused.len() {
            0..TELLING_DENIALS => HashSet::new(),
            _ => self.refused_consumers(requests, answers, refused),
        };
        let of_refused =
            |subject: &str| consumer_of(subject).is_some_and(|name| consumers.contains(&name));
        let result = |(index, (request, (slot, asks))): (usize, (&Request, &(usize, bool)))| {
            if index >= sent {
                return Err(unsent("the settling connection is gone"));
            }
            // The answer to the last request of a group does not confirm a refused one. A request with an answer
            // of its own was not refused: an earlier request of that subject was.
            let answered = *asks && answers[*slot].is_some();
            if !answered && refused.contains(&*request.subject) {
                return Err(Denial::Permission(request.subject.as_ref().to_owned()).into());
            }
            match &answers[*slot] {
                // The earlier requests of the group came sooner. Somebody may have listened then.
                Some((RequestAnswer::NoResponder, _)) if !asks => Err(BrokerError::Unconfirmed),
                // JetStream confirms an ack that settled the next holder's delivery, too.
                Some((RequestAnswer::Replied(_), at))
                    if request.by.is_some_and(|by| by.passed(at)) =>
                {
                    Err(BrokerError::Late)
                }
                Some((answer, _)) => Ok(answer.clone()),
                None if !consumers.is_empty() && of_refused(&request.subject) => {
                    Err(Denial::Permission(request.subject.as_ref().to_owned()).into())
                }
                None => Err(BrokerError::Unconfirmed),
            }
        };
        requests.iter().zip(&self.slots).enumerate().map(result).collect()
    }
}

pub(super) fn unsent(why: &str) -> BrokerError {
    BrokerError::Unsent(why.to_owned())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::clock;

    fn requests(groups: &[Option<u32>]) -> Vec<Request> {
        let request = |group: &Option<u32>| Request {
            confirm_group: *group,
            ..Request::new("s", Bytes::new())
        };
        groups.iter().map(request).collect()
    }

    #[test]
    fn the_last_request_of_a_group_asks_for_all_of_it() {
        let plan = ConfirmPlan::of(&requests(&[Some(1), None, Some(2), Some(1), None, Some(1)]));
        let asks: Vec<bool> = plan.slots.iter().map(|(_, asks)| *asks).collect();
        assert_eq!(asks, [false, true, true, false, true, true]);
        assert_eq!(plan.count, 4);
        let slot = |index: usize| plan.slots[index].0;
        assert!(slot(0) == slot(5) && slot(3) == slot(5) && slot(2) != slot(5));
        let long = ConfirmPlan::of(&requests(&vec![Some(1); 2 * MAX_PER_CONFIRMATION + 1]));
        assert_eq!(long.count, 3, "an answer confirms a bounded number");
    }

    #[test]
    fn a_request_that_never_left_is_unsent_and_one_without_answer_unconfirmed() {
        let requests = requests(&[None, None, Some(1), Some(1)]);
        let plan = ConfirmPlan::of(&requests);
        let results = plan.results(&requests, &vec![None; plan.count], 3, &HashSet::new());
        for index in [0, 1, 2] {
            assert_eq!(results[index], Err(BrokerError::Unconfirmed), "{index}");
        }
        assert!(matches!(results[3], Err(BrokerError::Unsent(_))));
    }

    #[test]
    fn a_refusal_concerns_its_own_request_alone() {
        let mut requests = requests(&[None, Some(1), Some(1), Some(1)]);
        for (index, request) in requests.iter_mut().enumerate() {
            request.subject = index.to_string().into();
        }
        let plan = ConfirmPlan::of(&requests);
        let refused = |indices: &[&str]| indices.iter().map(|index| (*index).to_owned()).collect();
        let denied = |index: usize| Err(Denial::Permission(index.to_string()).into());
        let mut answers = vec![None; plan.count];
        answers[plan.slots[3].0] = Some((RequestAnswer::Replied(Bytes::new()), clock::reading()));
        let results = plan.results(&requests, &answers, 4, &refused(&["0", "1"]));
        let done = Ok(RequestAnswer::Replied(Bytes::new()));
        assert_eq!(results, [denied(0), denied(1), done.clone(), done]);
        // If the last of a group is refused, nothing confirms the others.
        let results = plan.results(&requests, &vec![None; plan.count], 4, &refused(&["3"]));
        let unknown = Err(BrokerError::Unconfirmed);
        assert_eq!(results, [unknown.clone(), unknown.clone(), unknown, denied(3)]);
    }

    #[test]
    fn a_request_with_an_answer_was_not_refused_though_an_earlier_one_of_its_subject_was() {
        let requests = requests(&[None, None, Some(1), Some(1)]);
        let plan = ConfirmPlan::of(&requests);
        let mut answers = vec![None; plan.count];
        for slot in [plan.slots[1].0, plan.slots[3].0] {
            answers[slot] = Some((RequestAnswer::Replied(Bytes::new()), clock::reading()));
        }
        let results = plan.results(&requests, &answers, 4, &HashSet::from(["s".to_owned()]));
        let denied = Err(Denial::Permission("s".to_owned()).into());
        let done = Ok(RequestAnswer::Replied(Bytes::new()));
        assert_eq!(results, [denied.clone(), done.clone(), denied, done]);
    }

    #[test]
    fn no_responder_is_known_of_the_last_request_of_a_group_alone() {
        let requests = requests(&[Some(1), Some(1), None]);
        let plan = ConfirmPlan::of(&requests);
        let answers = vec![Some((RequestAnswer::NoResponder, clock::reading())); plan.count];
        let results = plan.results(&requests, &answers, 3, &HashSet::new());
        let nobody = Ok(RequestAnswer::NoResponder);
        assert_eq!(results, [Err(BrokerError::Unconfirmed), nobody.clone(), nobody]);
    }

    #[test]
    fn a_confirmation_after_the_deadline_confirms_nothing() {
        let made = clock::reading();
        let mut requests = requests(&[Some(1), Some(1), Some(1)]);
        for (request, after) in requests.iter_mut().zip([1, 2, 3]) {
            request.by = Some(Deadline::new(made.now + Duration::from_secs(after), made));
        }
        let plan = ConfirmPlan::of(&requests);
        let at = made.later(Duration::from_secs(2));
        let answers = vec![Some((RequestAnswer::Replied(Bytes::new()), at)); plan.count];
        let results = plan.results(&requests, &answers, 3, &HashSet::new());
        let late = Err(BrokerError::Late);
        assert_eq!(results, [late.clone(), late, Ok(RequestAnswer::Replied(Bytes::new()))]);
    }
}
