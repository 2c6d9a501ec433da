//! Which of many requests asks for an answer, for whom that answer stands, and what is known of each
//! in the end. Pure: it sends nothing and waits for nothing.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;

use super::settle::consumer_of;
use crate::{
    broker::{BrokerError, ConsumerName, Denial},
    clock::{Deadline, Reading},
};

/// Most requests that one answer stands for: as many are unconfirmed when it is lost.
const MAX_PER_CONFIRMATION: usize = 64;
/// The library keeps 128 events that nobody has read yet, and drops what comes then.
const MAX_UNREAD_DENIALS: usize = 64;

/// One request to publish.
pub(super) struct Request {
    pub(super) subject: Box<str>,
    pub(super) payload: Bytes,
    /// As in [`crate::broker::AckPublish`].
    pub(super) line: Option<u32>,
    /// The same, on a machine that may be suspended before.
    pub(super) by: Option<Deadline>,
}

/// What a request was answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum RequestAnswer {
    Replied(Bytes),
    /// Nobody listens there: it has had no effect and never will.
    NoResponder,
}

/// Which requests are answered: by place, the slot whose answer stands for it, and whether it is
/// this request that asks for that answer.
pub(super) struct ConfirmPlan {
    pub(super) slots: Vec<(usize, bool)>,
    pub(super) count: usize,
}

impl ConfirmPlan {
    /// The last request of a line asks, for itself and those before it.
    pub(super) fn of(requests: &[Request]) -> Self {
        let mut slots = vec![(0, true); requests.len()];
        let mut count = 0;
        // For each line, the slot that is being filled from behind, and how far.
        let mut lines: Vec<(u32, usize, usize)> = Vec::new();
        for (place, request) in requests.iter().enumerate().rev() {
            let line = lines.iter_mut().find(|(line, ..)| Some(*line) == request.line);
            if let Some((_, slot, used)) = line {
                if *used < MAX_PER_CONFIRMATION {
                    *used += 1;
                    slots[place] = (*slot, false);
                    continue;
                }
                (*slot, *used) = (count, 1);
            } else if let Some(line) = request.line {
                lines.push((line, count, 1));
            }
            slots[place] = (count, true);
            count += 1;
        }
        Self { slots, count }
    }

    /// Consumers of which so many requests were refused, and none was answered, that the others were
    /// refused, too: the library drops refusals that come faster than they are read.
    pub(super) fn refused_as_a_whole(
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
        let whole = |(name, count)| {
            (count >= MAX_UNREAD_DENIALS && !served.contains(&name)).then_some(name)
        };
        counts.into_iter().filter_map(whole).collect()
    }

    /// What became of each. Those from place `sent` on never left.
    pub(super) fn results(
        &self,
        requests: &[Request],
        answers: &[Option<(RequestAnswer, Reading)>],
        sent: usize,
        refused: &HashSet<String>,
    ) -> Vec<Result<RequestAnswer, BrokerError>> {
        let whole = match refused.len() {
            0..MAX_UNREAD_DENIALS => HashSet::new(),
            _ => self.refused_as_a_whole(requests, answers, refused),
        };
        let of_whole =
            |subject: &str| consumer_of(subject).is_some_and(|name| whole.contains(&name));
        let result = |(place, (request, (slot, asks))): (usize, (&Request, &(usize, bool)))| {
            if place >= sent {
                return Err(unsent("the settling connection is gone"));
            }
            // Whatever is answered to the last of a line: this one was not among it.
            if refused.contains(&*request.subject) {
                return Err(Denial::Permission(request.subject.as_ref().to_owned()).into());
            }
            match &answers[*slot] {
                // When those before it came, somebody may still have listened.
                Some((RequestAnswer::NoResponder, _)) if !asks => Err(BrokerError::Unconfirmed),
                // JetStream confirms what settled the next holder's delivery, too.
                Some((RequestAnswer::Replied(_), at))
                    if request.by.is_some_and(|by| by.passed(at)) =>
                {
                    Err(BrokerError::Unconfirmed)
                }
                Some((answer, _)) => Ok(answer.clone()),
                None if !whole.is_empty() && of_whole(&request.subject) => {
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

    fn requests(lines: &[Option<u32>]) -> Vec<Request> {
        let request = |line: &Option<u32>| Request {
            subject: "s".into(),
            payload: Bytes::new(),
            line: *line,
            by: None,
        };
        lines.iter().map(request).collect()
    }

    #[test]
    fn the_last_of_a_line_asks_for_all_of_it_and_others_for_themselves() {
        let plan = ConfirmPlan::of(&requests(&[Some(1), None, Some(2), Some(1), None, Some(1)]));
        let asks: Vec<bool> = plan.slots.iter().map(|(_, asks)| *asks).collect();
        assert_eq!(asks, [false, true, true, false, true, true]);
        assert_eq!(plan.count, 4);
        let slot = |place: usize| plan.slots[place].0;
        assert!(slot(0) == slot(5) && slot(3) == slot(5) && slot(2) != slot(5));
        let long = ConfirmPlan::of(&requests(&vec![Some(1); 2 * MAX_PER_CONFIRMATION + 1]));
        assert_eq!(long.count, 3, "an answer stands for a bounded number");
    }

    #[test]
    fn what_never_left_is_told_from_what_was_never_confirmed() {
        let requests = requests(&[None, None, Some(1), Some(1)]);
        let plan = ConfirmPlan::of(&requests);
        let results = plan.results(&requests, &vec![None; plan.count], 3, &HashSet::new());
        for place in [0, 1, 2] {
            assert_eq!(results[place], Err(BrokerError::Unconfirmed), "{place}");
        }
        assert!(matches!(results[3], Err(BrokerError::Unsent(_))));
    }

    #[test]
    fn what_was_refused_is_told_of_itself_alone() {
        let mut requests = requests(&[None, Some(1), Some(1), Some(1)]);
        for (place, request) in requests.iter_mut().enumerate() {
            request.subject = place.to_string().into();
        }
        let plan = ConfirmPlan::of(&requests);
        let refused = |places: &[&str]| places.iter().map(|place| (*place).to_owned()).collect();
        let denied = |place: usize| Err(Denial::Permission(place.to_string()).into());
        let mut answers = vec![None; plan.count];
        answers[plan.slots[3].0] = Some((RequestAnswer::Replied(Bytes::new()), clock::reading()));
        let results = plan.results(&requests, &answers, 4, &refused(&["0", "1"]));
        let done = Ok(RequestAnswer::Replied(Bytes::new()));
        assert_eq!(results, [denied(0), denied(1), done.clone(), done]);
        // Nobody answers for those before one that was refused.
        let results = plan.results(&requests, &vec![None; plan.count], 4, &refused(&["3"]));
        let unknown = Err(BrokerError::Unconfirmed);
        assert_eq!(results, [unknown.clone(), unknown.clone(), unknown, denied(3)]);
    }

    #[test]
    fn that_nobody_listens_is_known_of_the_last_of_a_line_alone() {
        let requests = requests(&[Some(1), Some(1), None]);
        let plan = ConfirmPlan::of(&requests);
        let answers = vec![Some((RequestAnswer::NoResponder, clock::reading())); plan.count];
        let results = plan.results(&requests, &answers, 3, &HashSet::new());
        let nobody = Ok(RequestAnswer::NoResponder);
        assert_eq!(results, [Err(BrokerError::Unconfirmed), nobody.clone(), nobody]);
    }

    #[test]
    fn what_is_confirmed_after_its_delivery_was_over_is_not_known_to_be_ours() {
        let made = clock::reading();
        let mut requests = requests(&[Some(1), Some(1), Some(1)]);
        for (request, after) in requests.iter_mut().zip([1, 2, 3]) {
            request.by = Some(Deadline::new(made.now + Duration::from_secs(after), made));
        }
        let plan = ConfirmPlan::of(&requests);
        let at = made.later(Duration::from_secs(2));
        let answers = vec![Some((RequestAnswer::Replied(Bytes::new()), at)); plan.count];
        let results = plan.results(&requests, &answers, 3, &HashSet::new());
        let late = Err(BrokerError::Unconfirmed);
        assert_eq!(results, [late.clone(), late, Ok(RequestAnswer::Replied(Bytes::new()))]);
    }
}
