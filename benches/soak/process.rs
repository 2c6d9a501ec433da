//! The memory and the descriptors of the proxy's process, read from /proc.

use std::fs;

#[derive(Debug, Clone, Copy)]
pub struct Footprint {
    /// Resident memory in MiB.
    pub memory: f64,
    /// Open descriptors.
    pub descriptors: usize,
}

/// Memory may grow by this share and these MiB: what allocators keep. Runs of two minutes began with
/// 32 to 40 MiB and ended with 38 to 40.
const SHARE: f64 = 0.25;
const MIB: f64 = 10.0;

impl Footprint {
    pub fn of(pid: u32) -> Self {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        let kib: f64 = resident.trim().trim_end_matches(" kB").parse().unwrap();
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
        Self { memory: kib / 1024.0, descriptors }
    }

    /// The findings, if the process has grown.
    pub fn grown(&self, end: &Self) -> Vec<String> {
        let mut wrong = Vec::new();
        if end.descriptors > self.descriptors {
            wrong.push(format!("descriptors: {} became {}", self.descriptors, end.descriptors));
        }
        if end.memory > self.memory * (1.0 + SHARE) + MIB {
            wrong.push(format!("memory: {:.1} MiB became {:.1} MiB", self.memory, end.memory));
        }
        wrong
    }
}
