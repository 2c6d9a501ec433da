//! `fetch-proxy probe`: a health client, for exec probes in images without a shell.

use std::time::Duration;

use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use super::hand;

/// Asks the listener at `addr` for the health of `service`: its status by name, and whether it is
/// serving.
///
/// # Errors
/// Why it did not answer, for people.
pub async fn probe(addr: &str, service: &str, timeout: Duration) -> Result<(String, bool), String> {
    let ask = async {
        let channel = hand::connect(addr, timeout).await?;
        let request = HealthCheckRequest { service: service.to_owned() };
        let answer = HealthClient::new(channel).check(request).await;
        answer.map_err(|status| status.message().to_owned())
    };
    let answer = tokio::time::timeout(timeout, ask)
        .await
        .map_err(|_| format!("{addr}: no answer within {timeout:?}"))??;
    let status = answer.into_inner().status();
    Ok((status.as_str_name().to_owned(), status == ServingStatus::Serving))
}
