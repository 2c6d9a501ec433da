//! `fetch-proxy probe`: a health client, for exec probes in images without a shell.

use std::time::Duration;

use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use super::connect::{ClientTls, connect};

/// The time from a failed connection to the next try: a new Service of Kubernetes has no pods yet.
const PROBE_RETRY: Duration = Duration::from_millis(200);

/// Asks the listener at `addr` for the health of `service`, without files for TLS. See [`probe_by`].
///
/// # Errors
/// The reason why there is no answer, as text.
pub async fn probe(addr: &str, service: &str, timeout: Duration) -> Result<(String, bool), String> {
    probe_by(addr, &ClientTls::default(), service, timeout).await
}

/// Asks the listener at `addr` for the health of `service`. Returns the name of the status, and whether it
/// is SERVING. Tries to connect until `timeout`; the first answer counts.
///
/// # Errors
/// The reason why there is no answer, as text.
pub async fn probe_by(
    addr: &str,
    tls: &ClientTls,
    service: &str,
    timeout: Duration,
) -> Result<(String, bool), String> {
    let mut silence = format!("{addr}: no answer within {timeout:?}");
    let ask = async {
        let channel = loop {
            match connect(addr, tls, timeout).await {
                Ok(channel) => break channel,
                Err(why) => silence = why,
            }
            tokio::time::sleep(PROBE_RETRY).await;
        };
        let request = HealthCheckRequest { service: service.to_owned() };
        let answer = HealthClient::new(channel).check(request).await;
        answer.map_err(|status| status.message().to_owned())
    };
    let answered = tokio::time::timeout(timeout, ask).await;
    let status = answered.map_err(|_| silence)??.into_inner().status();
    Ok((status.as_str_name().to_owned(), status == ServingStatus::Serving))
}
