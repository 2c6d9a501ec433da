//! The numbers of this process, read from `/proc`. Without `/proc`, these families have no value.

use std::{fs, sync::LazyLock};

use rustix::{
    param::{clock_ticks_per_second, page_size},
    process::{Resource, getrlimit},
};

use super::{sheet::Sheet, table::FamilyId};

/// The time at which the system started, in seconds since 1970. It does not change.
static BOOTED: LazyLock<Option<f64>> = LazyLock::new(|| {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
});

/// The fields of `/proc/self/stat` after the name, which are numbered from 3 (proc(5)).
struct Stat(Vec<f64>);

impl Stat {
    /// The name of the program may have spaces and parentheses. It ends at the last parenthesis.
    fn read(text: &str) -> Option<Self> {
        let (_, rest) = text.rsplit_once(')')?;
        // The first of these fields is a letter.
        let fields = rest.split_whitespace().map(|field| field.parse().unwrap_or(0.0));
        Some(Self(fields.collect()))
    }

    fn field(&self, number: usize) -> Option<f64> {
        self.0.get(number - 3).copied()
    }
}

/// Tells the families `process_*`.
pub fn process(sheet: &mut Sheet) {
    let stat = fs::read_to_string("/proc/self/stat").ok();
    if let Some(stat) = stat.as_deref().and_then(Stat::read) {
        let ticks = clock_ticks_per_second() as f64;
        let cpu = stat.field(14).zip(stat.field(15)).map(|(user, system)| (user + system) / ticks);
        let resident = stat.field(24).map(|pages| pages * page_size() as f64);
        let start = stat.field(22).zip(*BOOTED).map(|(after, booted)| booted + after / ticks);
        let values = [
            (FamilyId::ProcessCpu, cpu),
            (FamilyId::ProcessResident, resident),
            (FamilyId::ProcessVirtual, stat.field(23)),
            (FamilyId::ProcessThreads, stat.field(20)),
            (FamilyId::ProcessStart, start),
        ];
        for (id, value) in values {
            value.into_iter().for_each(|value| sheet.set(id, value));
        }
    }
    if let Ok(open) = fs::read_dir("/proc/self/fd") {
        // One of them is the folder itself.
        sheet.set(FamilyId::ProcessFds, open.count().saturating_sub(1) as f64);
    }
    if let Some(most) = getrlimit(Resource::Nofile).current {
        sheet.set(FamilyId::ProcessMaxFds, most as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_behind_any_name_of_the_program() {
        let numbers: Vec<String> = (4..=52).map(|number| number.to_string()).collect();
        let stat = Stat::read(&format!("7 (a) b (c) S {}", numbers.join(" "))).unwrap();
        assert_eq!(stat.field(14), Some(14.0));
        assert_eq!(stat.field(24), Some(24.0));
        assert_eq!(stat.field(99), None);
    }

    #[test]
    fn process_has_memory_files_and_a_start_in_the_past() {
        let mut sheet = Sheet::default();
        process(&mut sheet);
        let of = |id| sheet.of(id)[0].1;
        assert!(of(FamilyId::ProcessResident) > 1e6);
        assert!(of(FamilyId::ProcessVirtual) >= of(FamilyId::ProcessResident));
        assert!(of(FamilyId::ProcessFds) >= 3.0);
        assert!(of(FamilyId::ProcessThreads) >= 2.0);
        // A machine of this program is younger than 2000 days before now, and not from the future.
        assert!((1.7e9..1e11).contains(&of(FamilyId::ProcessStart)));
    }
}
