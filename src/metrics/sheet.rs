//! The values that their owners tell at a scrape. Nothing is kept from one scrape to the next.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fmt,
    sync::{Mutex, PoisonError},
};

use super::{
    store::{Values, row},
    table::{FamilyId, FamilyKind},
};

/// The values of one scrape.
#[derive(Debug, Default)]
pub struct Sheet(BTreeMap<FamilyId, Vec<(Values, f64)>>);

/// The owners to ask.
#[derive(Default)]
pub(super) struct Sources(Mutex<Vec<Source>>);

type Source = Box<dyn Fn(&mut Sheet) + Send + Sync>;

impl Sheet {
    /// The value of a family without labels.
    pub fn set(&mut self, id: FamilyId, value: f64) {
        self.put(id, Vec::new(), value);
    }

    /// The value of one series.
    pub fn set_of<const N: usize>(&mut self, id: FamilyId, values: [&str; N], value: f64) {
        self.put(id, values.map(|value| Cow::Owned(value.to_owned())).into(), value);
    }

    /// Adds to the value of one series, if it has one.
    pub fn add_of<const N: usize>(&mut self, id: FamilyId, values: [&str; N], more: f64) {
        let known = self.0.entry(id).or_default();
        let same = |known: &&mut (Values, f64)| known.0.iter().map(|value| &**value).eq(values);
        match known.iter_mut().find(same) {
            Some((_, value)) => *value += more,
            None => self.set_of(id, values, more),
        }
    }

    /// The values of a whole family, which are then its only ones.
    pub(super) fn show_all(&mut self, id: FamilyId, values: Vec<(Values, f64)>) {
        self.0.insert(id, values);
    }

    fn put(&mut self, id: FamilyId, values: Values, value: f64) {
        debug_assert_eq!(row(id).labels.len(), values.len(), "{id:?}");
        debug_assert!(!matches!(row(id).kind, FamilyKind::Histogram(_)), "{id:?}");
        self.0.entry(id).or_default().push((values, value));
    }

    pub(super) fn of(&self, id: FamilyId) -> &[(Values, f64)] {
        self.0.get(&id).map_or(&[], Vec::as_slice)
    }
}

impl Sources {
    pub(super) fn add(&self, source: impl Fn(&mut Sheet) + Send + Sync + 'static) {
        let mut sources = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        sources.push(Box::new(source));
    }

    pub(super) fn ask(&self) -> Sheet {
        let mut sheet = Sheet::default();
        for source in self.0.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            source(&mut sheet);
        }
        sheet
    }
}

impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sources")
    }
}
