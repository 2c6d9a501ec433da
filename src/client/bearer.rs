//! The credential of the client: an API key from a file. It is never sent where others could read it.

use std::{fs, net::IpAddr, path::Path};

use tonic::{
    Request,
    metadata::{Ascii, MetadataValue},
};

use super::connect::reachable;

/// Adds the credential in this file to a request for `addr`, if there is a file.
///
/// # Errors
/// The reason why the credential cannot be sent, as text. It never shows the credential.
pub(super) fn add<T>(
    request: &mut Request<T>,
    addr: &str,
    file: Option<&Path>,
) -> Result<(), String> {
    let Some(file) = file else { return Ok(()) };
    if !is_protected(addr) {
        return Err(format!(
            "--token-file: a credential is not sent to {addr} without TLS: use https://"
        ));
    }
    let text = fs::read_to_string(file)
        .map_err(|error| format!("--token-file: cannot read {}: {error}", file.display()))?;
    let value = Some(text.trim()).filter(|text| !text.is_empty());
    let value = value.and_then(|text| format!("Bearer {text}").parse().ok());
    let mut value: MetadataValue<Ascii> =
        value.ok_or_else(|| format!("--token-file: {} has no credential", file.display()))?;
    value.set_sensitive(true);
    request.metadata_mut().insert("authorization", value);
    Ok(())
}

/// Whether nobody on the way can read what is sent there.
fn is_protected(addr: &str) -> bool {
    if addr.starts_with("https://") {
        return true;
    }
    let reached = reachable(addr.strip_prefix("http://").unwrap_or(addr));
    let host = reached.rsplit_once(':').map_or(&*reached, |(host, _)| host);
    let address = host.trim_matches(['[', ']']).parse::<IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_without_a_credential_is_refused_before_the_call() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for (text, refused) in [("", true), (" \n", true), ("a\nb", true), ("fpk_a\n", false)] {
            fs::write(file.path(), text).unwrap();
            let added = add(&mut Request::new(()), "127.0.0.1:50051", Some(file.path()));
            let said = added.err().is_some_and(|error| error.ends_with("has no credential"));
            assert_eq!(said, refused, "{text:?}");
        }
    }

    #[test]
    fn credential_is_sent_with_tls_or_to_this_machine_alone() {
        for (addr, protected) in [
            ("https://proxy.example:50051", true),
            ("127.0.0.1:50051", true),
            ("http://localhost:50051", true),
            ("[::1]:50051", true),
            ("[::]:50051", true),
            (":50051", true),
            ("proxy:50051", false),
            ("http://10.0.0.1:50051", false),
            ("localhost.example:50051", false),
        ] {
            assert_eq!(is_protected(addr), protected, "{addr}");
        }
    }
}
