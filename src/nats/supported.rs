//! Which versions of nats-server can be used. Pure.

use semver::Version;

/// The oldest supported nats-server. A server before 2.10.16 can ignore a `+TERM` with a reason, and
/// answer as if it had not.
pub const OLDEST_SERVER: Version = Version::new(2, 10, 16);

/// Whether a server of this version can be used. A version that cannot be parsed is accepted: it may be a
/// private build.
pub(super) fn is_supported(version: &str) -> bool {
    Version::parse(version.trim_start_matches('v')).map_or(true, |version| {
        // A pre-release like 2.10.16-beta counts as its release.
        (version.major, version.minor, version.patch)
            >= (OLDEST_SERVER.major, OLDEST_SERVER.minor, OLDEST_SERVER.patch)
    })
}

/// What is wrong with a server of this version, for people.
pub(super) fn unsupported(version: &str) -> String {
    format!(
        "nats-server {version} is too old: {OLDEST_SERVER} or newer is needed, because older ones \
         can ignore a Term with a reason and answer as if they had not"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_from_2_10_16_on_are_supported() {
        for version in ["2.10.16", "2.10.16-beta.1", "2.11.0-dev", "2.15.1", "3.0.0", "v2.12.0"] {
            assert!(is_supported(version), "{version}");
        }
        for version in ["2.9.10", "2.10.15", "1.4.0"] {
            assert!(!is_supported(version), "{version}");
        }
    }
}
