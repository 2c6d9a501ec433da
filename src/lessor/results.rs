//! One result for each item, in the order of the items, although the items are settled in different
//! places.
//!
//! ```text
//!           0 ──▶ answered at once ──────────────── set ──────▶ ┌─────────┐
//!  items ─▶ 1 ──▶ group of place A ──▶ its results ─ set_all ──▶ │ Results │ ──▶ into_vec: 0, 1, 2, 3
//!           2 ──▶ group of place B ──▶ its results ─ set_all ──▶ │ by index│
//!           3 ──▶ group of place A                              └─────────┘
//! ```
//! 1. Each result comes back at the index of its item.
//! 2. A result is set once. Only [`Results::replace`] overwrites a result.
//! 3. An item without a result is a bug. A debug build panics. A release build answers
//!    [`Unreported::unreported`], which is never a success.

use super::Error;

/// A result that has a value for "no place reported a result".
pub trait Unreported {
    /// The answer for an item whose result was lost. It must not promise anything.
    fn unreported() -> Self;
}

impl<T, E: From<Error>> Unreported for Result<T, E> {
    /// [`Error::Unconfirmed`]: the item may have been settled.
    fn unreported() -> Self {
        Err(Error::Unconfirmed.into())
    }
}

impl<R: Unreported> Unreported for Option<R> {
    fn unreported() -> Self {
        Some(R::unreported())
    }
}

/// Items that are settled in one place, each with its index in the whole list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group<T> {
    /// The index of each item, in the order of `items`.
    indices: Vec<usize>,
    items: Vec<T>,
}

impl<T> Group<T> {
    /// A group without items, with room for `capacity` items.
    pub fn with_capacity(capacity: usize) -> Self {
        Self { indices: Vec::with_capacity(capacity), items: Vec::with_capacity(capacity) }
    }

    /// Adds the item with this index in the whole list.
    pub fn push(&mut self, index: usize, item: T) {
        self.indices.push(index);
        self.items.push(item);
    }

    /// The items in the order in which they were added.
    pub fn items(&self) -> &[T] {
        &self.items
    }

    /// Whether the group has no items.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// The indices for [`Results::set_all`], and the items for the place that settles them.
    pub fn into_parts(self) -> (Vec<usize>, Vec<T>) {
        (self.indices, self.items)
    }
}

impl<T> Default for Group<T> {
    fn default() -> Self {
        Self::with_capacity(0)
    }
}

impl<T> From<Vec<T>> for Group<T> {
    /// The whole list as one group.
    fn from(items: Vec<T>) -> Self {
        Self { indices: (0..items.len()).collect(), items }
    }
}

impl<T> IntoIterator for Group<T> {
    type Item = (usize, T);
    type IntoIter = std::iter::Zip<std::vec::IntoIter<usize>, std::vec::IntoIter<T>>;

    fn into_iter(self) -> Self::IntoIter {
        self.indices.into_iter().zip(self.items)
    }
}

/// The results of a list of items, as they come in.
#[derive(Debug)]
pub struct Results<R> {
    /// `None`: no result yet.
    slots: Vec<Option<R>>,
}

impl<R> Results<R> {
    /// No result yet for any of `len` items.
    pub fn new(len: usize) -> Self {
        Self { slots: std::iter::repeat_with(|| None).take(len).collect() }
    }

    /// Sets the result of one item. The item must not have a result yet.
    pub fn set(&mut self, index: usize, result: R) {
        debug_assert!(self.slots[index].is_none(), "item {index} has two results");
        self.slots[index] = Some(result);
    }

    /// Sets the results of one group, in the order of its items.
    pub fn set_all(&mut self, indices: Vec<usize>, results: impl IntoIterator<Item = R>) {
        let mut results = results.into_iter();
        for index in indices {
            let Some(result) = results.next() else {
                debug_assert!(false, "item {index} has no result");
                return;
            };
            self.set(index, result);
        }
        debug_assert!(results.next().is_none(), "a group has more results than items");
    }

    /// Overwrites the result of an item after a second attempt at it.
    pub fn replace(&mut self, index: usize, result: R) {
        debug_assert!(self.slots[index].is_some(), "item {index} has no result to replace");
        self.slots[index] = Some(result);
    }

    /// The results so far, each with its index.
    pub fn iter(&self) -> impl Iterator<Item = (usize, &R)> {
        self.slots.iter().enumerate().filter_map(|(index, slot)| Some((index, slot.as_ref()?)))
    }
}

impl<R: Unreported> Results<R> {
    /// One result for each item, in the order of the items.
    pub fn into_vec(self) -> Vec<R> {
        let slots = self.slots.into_iter().enumerate();
        let results = slots.map(|(index, slot)| {
            slot.unwrap_or_else(|| {
                debug_assert!(false, "item {index} has no result");
                R::unreported()
            })
        });
        results.collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A result that names its item.
    type Answer = Result<u32, Error>;

    /// The group of an item, and whether a second attempt follows.
    #[derive(Debug, Clone, Copy)]
    struct Route {
        /// `None`: the item is answered at once.
        group: Option<usize>,
        again: bool,
    }

    fn route() -> impl Strategy<Value = Route> {
        let group = prop::option::of(0..4_usize);
        (group, any::<bool>()).prop_map(|(group, again)| Route { group, again })
    }

    proptest! {
        #[test]
        fn each_result_returns_to_its_index_from_any_group_in_any_order(
            (items, order) in (prop::collection::vec((any::<u32>(), route()), 0..40),
                Just((0..4).collect::<Vec<usize>>()).prop_shuffle()),
        ) {
            let answer = |item: u32| if item.is_multiple_of(3) { Err(Error::LeaseBusy) } else { Ok(item) };
            let mut results: Results<Answer> = Results::new(items.len());
            let mut groups: Vec<Group<u32>> = vec![Group::default(); 4];
            for (index, &(item, route)) in items.iter().enumerate() {
                match route.group {
                    Some(group) => groups[group].push(index, item),
                    None => results.set(index, answer(item)),
                }
            }
            for group in order {
                let (indices, items) = std::mem::take(&mut groups[group]).into_parts();
                results.set_all(indices, items.into_iter().map(answer));
            }
            prop_assert_eq!(results.iter().count(), items.len());
            let again = items.iter().enumerate().filter(|(_, (_, route))| route.again);
            for (index, (item, _)) in again {
                results.replace(index, Ok(!item));
            }
            let wanted: Vec<Answer> = items.iter()
                .map(|&(item, route)| if route.again { Ok(!item) } else { answer(item) })
                .collect();
            prop_assert_eq!(results.into_vec(), wanted);
        }

        #[test]
        fn a_whole_list_is_a_group_with_every_index(items: Vec<u32>) {
            let pairs: Vec<_> = items.iter().copied().enumerate().collect();
            let group = Group::from(items);
            prop_assert_eq!(group.is_empty(), pairs.is_empty());
            prop_assert_eq!(group.into_iter().collect::<Vec<_>>(), pairs);
        }
    }

    #[test]
    fn a_lost_result_promises_nothing() {
        assert_eq!(Answer::unreported(), Err(Error::Unconfirmed));
        assert_eq!(Option::<Answer>::unreported(), Some(Err(Error::Unconfirmed)));
    }

    #[cfg(debug_assertions)]
    mod bugs {
        use super::*;

        #[test]
        #[should_panic(expected = "item 1 has no result")]
        fn an_item_without_a_result_panics() {
            let mut results: Results<Answer> = Results::new(2);
            results.set(0, Ok(7));
            results.into_vec();
        }

        #[test]
        #[should_panic(expected = "item 1 has no result")]
        fn a_place_with_too_few_results_panics() {
            let mut results: Results<Answer> = Results::new(2);
            let (indices, _) = Group::from(vec![1, 2]).into_parts();
            results.set_all(indices, [Ok(1)]);
        }

        #[test]
        #[should_panic(expected = "more results than items")]
        fn a_place_with_too_many_results_panics() {
            let mut results: Results<Answer> = Results::new(1);
            let (indices, _) = Group::from(vec![1]).into_parts();
            results.set_all(indices, [Ok(1), Ok(2)]);
        }

        #[test]
        #[should_panic(expected = "item 0 has two results")]
        fn a_second_result_for_one_item_panics() {
            let mut results: Results<Answer> = Results::new(1);
            results.set(0, Ok(1));
            results.set(0, Ok(2));
        }
    }

    #[cfg(not(debug_assertions))]
    #[test]
    fn an_item_without_a_result_is_answered_as_unconfirmed() {
        let mut results: Results<Answer> = Results::new(2);
        results.set(0, Ok(7));
        assert_eq!(results.into_vec(), [Ok(7), Err(Error::Unconfirmed)]);
    }
}
