//! The standard variables of OpenTelemetry. The library reads most of them itself. Here are those that it does
//! not implement, and checks of values that it would silently replace by others.

use std::{env, fs, io, time::Duration};

use opentelemetry_otlp::{
    ExporterBuildError, SpanExporter, WithTonicConfig as _,
    tonic_types::transport::{Certificate, ClientTlsConfig, Identity},
};
use opentelemetry_sdk::trace::{BatchConfig, BatchConfigBuilder};

use super::exporter::OwnThreadExporter;

/// The samplers of the specification that the library has.
const SAMPLERS: [&str; 6] = [
    "always_on",
    "always_off",
    "traceidratio",
    "parentbased_always_on",
    "parentbased_always_off",
    "parentbased_traceidratio",
];
/// Defaults of the specification.
const DEFAULT_QUEUE: usize = 2048;
const DEFAULT_EXPORT_TIMEOUT: Duration = Duration::from_secs(30);
const DEFAULT_LINKS: u32 = 128;

/// Valid settings, with an exporter that is built and has not connected.
#[derive(Debug)]
pub struct TraceSettings {
    pub(super) exporter: OwnThreadExporter,
    pub(super) joins: bool,
    pub(super) batches: BatchConfig,
    /// Most spans that wait for the exporter.
    pub(super) queue: usize,
    /// Most links of a span.
    pub(super) links: u32,
}

/// A variable that cannot be used, in one sentence.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct TraceSettingsError(String);

impl From<io::Error> for TraceSettingsError {
    fn from(error: io::Error) -> Self {
        Self(format!("traces cannot start: {error}"))
    }
}

impl From<ExporterBuildError> for TraceSettingsError {
    fn from(error: ExporterBuildError) -> Self {
        Self(format!("traces cannot start: {error}"))
    }
}

/// The variables, checked.
#[derive(Debug, PartialEq, Eq)]
struct Variables {
    joins: bool,
    queue: usize,
    export_timeout: Duration,
    links: u32,
    /// Whether the receiver is reached by TLS.
    tls: bool,
    /// The files of TLS: authorities, and the certificate of this client with its key.
    authorities: Option<String>,
    certificate: Option<String>,
    key: Option<String>,
}

impl TraceSettings {
    /// Reads the variables. `None`: there are to be no traces.
    ///
    /// # Errors
    /// See [`TraceSettingsError`].
    pub fn load() -> Result<Option<Self>, TraceSettingsError> {
        let Some(variables) = Variables::read(|name| env::var(name).ok())? else {
            return Ok(None);
        };
        let exporter = OwnThreadExporter::new(variables.export_timeout, || variables.exporter())?;
        let Variables { joins, queue, links, .. } = variables;
        let batches = BatchConfigBuilder::default().with_max_queue_size(queue).build();
        Ok(Some(Self { exporter, joins, batches, queue, links }))
    }
}

impl Variables {
    fn read(var: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, TraceSettingsError> {
        // An empty variable is an unset variable, says the specification.
        let var = |name: &str| var(name).filter(|value| !value.is_empty());
        // A variable for traces comes before the one for all signals.
        let otlp = |name: &str| {
            let (of_traces, of_all) =
                (format!("OTEL_EXPORTER_OTLP_TRACES_{name}"), format!("OTEL_EXPORTER_OTLP_{name}"));
            let value = var(&of_traces).map(|value| (of_traces, value));
            value.or_else(|| var(&of_all).map(|value| (of_all, value)))
        };
        let disabled = var("OTEL_SDK_DISABLED").is_some_and(|is| is.eq_ignore_ascii_case("true"));
        let endpoint = otlp("ENDPOINT").filter(|_| !disabled);
        let Some((endpoint_variable, endpoint)) = endpoint else { return Ok(None) };
        match var("OTEL_TRACES_EXPORTER").as_deref() {
            None | Some("otlp") => {}
            Some("none") => return Ok(None),
            Some(other) => {
                return refuse(format!("OTEL_TRACES_EXPORTER must be otlp or none, not `{other}`"));
            }
        }
        if let Some((name, other)) = otlp("PROTOCOL").filter(|(_, protocol)| protocol != "grpc") {
            return refuse(format!(
                "{name} must be grpc, not `{other}`: traces are sent by OTLP over gRPC alone, in most \
                 receivers on port 4317"
            ));
        }
        let insecure = otlp("INSECURE").is_some_and(|(_, is)| is.eq_ignore_ascii_case("true"));
        let tls = match endpoint.split_once("://") {
            Some(("http", _)) => false,
            Some(("https", _)) => true,
            None => !insecure,
            Some(_) => {
                let why = "must begin with http:// or https://, such as http://localhost:4317";
                return refuse(format!("{endpoint_variable} {why}"));
            }
        };
        check_sampler(var("OTEL_TRACES_SAMPLER"), var("OTEL_TRACES_SAMPLER_ARG"))?;
        let number = |name: &str, unset: u64| match var(name).map(|value| value.parse()) {
            None => Ok(unset),
            Some(Ok(number)) if number > 0 => Ok(number),
            Some(_) => refuse(format!("{name} must be a whole number above 0")),
        };
        let queue = number("OTEL_BSP_MAX_QUEUE_SIZE", DEFAULT_QUEUE as u64)?;
        let timeout = number("OTEL_BSP_EXPORT_TIMEOUT", DEFAULT_EXPORT_TIMEOUT.as_millis() as u64)?;
        let links = number("OTEL_SPAN_LINK_COUNT_LIMIT", DEFAULT_LINKS.into())?;
        let file = |name| otlp(name).map(|(_, path)| path).filter(|_| tls);
        let (certificate, key) = (file("CLIENT_CERTIFICATE"), file("CLIENT_KEY"));
        if certificate.is_some() != key.is_some() {
            return refuse(
                "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE and OTEL_EXPORTER_OTLP_CLIENT_KEY must be given \
                 together",
            );
        }
        Ok(Some(Self {
            joins: joins(var("OTEL_PROPAGATORS"))?,
            queue: usize::try_from(queue).unwrap_or(usize::MAX),
            export_timeout: Duration::from_millis(timeout),
            links: u32::try_from(links).unwrap_or(u32::MAX),
            tls,
            authorities: file("CERTIFICATE"),
            certificate,
            key,
        }))
    }

    /// The exporter. It connects with its first batch.
    fn exporter(&self) -> Result<SpanExporter, TraceSettingsError> {
        let builder = SpanExporter::builder().with_tonic();
        Ok(if self.tls { builder.with_tls_config(self.tls()?) } else { builder }.build()?)
    }

    fn tls(&self) -> Result<ClientTlsConfig, TraceSettingsError> {
        let read = |path: &String| {
            fs::read(path).map_err(|error| {
                TraceSettingsError(format!("OTEL_EXPORTER_OTLP_*: cannot read {path}: {error}"))
            })
        };
        let tls = ClientTlsConfig::new();
        let tls = match &self.authorities {
            Some(path) => tls.ca_certificate(Certificate::from_pem(read(path)?)),
            None => tls.with_enabled_roots(),
        };
        let (Some(certificate), Some(key)) = (&self.certificate, &self.key) else { return Ok(tls) };
        Ok(tls.identity(Identity::from_pem(read(certificate)?, read(key)?)))
    }
}

/// Whether spans join the traces that `traceparent` names. Baggage is never read.
fn joins(propagators: Option<String>) -> Result<bool, TraceSettingsError> {
    let Some(propagators) = propagators else { return Ok(true) };
    let mut joins = false;
    for name in propagators.split(',').map(str::trim) {
        match name {
            "tracecontext" => joins = true,
            "baggage" | "none" => {}
            other => {
                return refuse(format!(
                    "OTEL_PROPAGATORS may have tracecontext, baggage or none, and not `{other}`"
                ));
            }
        }
    }
    Ok(joins)
}

fn check_sampler(name: Option<String>, ratio: Option<String>) -> Result<(), TraceSettingsError> {
    let Some(name) = name else { return Ok(()) };
    if !SAMPLERS.contains(&&*name) {
        let names = SAMPLERS.join(", ");
        return refuse(format!("OTEL_TRACES_SAMPLER must be one of {names}, not `{name}`"));
    }
    let valid = |ratio: String| ratio.parse().is_ok_and(|ratio: f64| (0.0..=1.0).contains(&ratio));
    if name.ends_with("traceidratio") && !ratio.is_none_or(valid) {
        return refuse("OTEL_TRACES_SAMPLER_ARG must be a number from 0 to 1, such as 0.01");
    }
    Ok(())
}

fn refuse<T>(why: impl Into<String>) -> Result<T, TraceSettingsError> {
    Err(TraceSettingsError(why.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENDPOINT: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4317");

    fn read(set: &[(&str, &str)]) -> Result<Option<Variables>, String> {
        let value = |name: &str| set.iter().find(|(set, _)| *set == name);
        let read = Variables::read(|name| value(name).map(|(_, value)| (*value).to_owned()));
        read.map_err(|error| error.to_string())
    }

    #[test]
    fn traces_are_off_without_an_endpoint_or_by_a_switch() {
        assert_eq!(read(&[]), Ok(None));
        assert_eq!(read(&[("OTEL_EXPORTER_OTLP_ENDPOINT", "")]), Ok(None));
        assert_eq!(
            read(&[("OTEL_TRACES_SAMPLER", "nonsense")]),
            Ok(None),
            "nobody asks for traces"
        );
        for off in [("OTEL_SDK_DISABLED", "TRUE"), ("OTEL_TRACES_EXPORTER", "none")] {
            assert_eq!(read(&[ENDPOINT, off]), Ok(None), "{off:?}");
        }
        for on in [("OTEL_SDK_DISABLED", "1"), ("OTEL_TRACES_EXPORTER", "otlp")] {
            assert!(read(&[ENDPOINT, on]).unwrap().is_some(), "{on:?}");
        }
    }

    #[test]
    fn endpoint_of_traces_comes_before_the_endpoint_of_all() {
        let of_traces = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "https://traces:4317");
        assert!(!read(&[ENDPOINT]).unwrap().unwrap().tls);
        assert!(read(&[ENDPOINT, of_traces]).unwrap().unwrap().tls);
        assert!(read(&[of_traces]).unwrap().unwrap().tls);
    }

    #[test]
    fn endpoint_without_a_scheme_is_reached_by_tls_unless_it_is_insecure() {
        let bare = ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4317");
        let insecure = ("OTEL_EXPORTER_OTLP_TRACES_INSECURE", "true");
        assert!(read(&[bare]).unwrap().unwrap().tls);
        assert!(!read(&[bare, insecure]).unwrap().unwrap().tls);
    }

    #[test]
    fn propagators_decide_whether_spans_join_other_traces() {
        for (given, joins) in [
            ("tracecontext,baggage", true),
            ("baggage, tracecontext", true),
            ("baggage", false),
            ("none", false),
        ] {
            let read = read(&[ENDPOINT, ("OTEL_PROPAGATORS", given)]).unwrap().unwrap();
            assert_eq!(read.joins, joins, "{given}");
        }
        assert!(read(&[ENDPOINT]).unwrap().unwrap().joins, "the default of the specification");
    }

    #[test]
    fn value_that_cannot_be_used_is_refused_by_its_name() {
        for (name, value, said) in [
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf", "must be grpc"),
            ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json", "must be grpc"),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "ftp://u:hunter2@a", "must begin with http://"),
            ("OTEL_TRACES_EXPORTER", "zipkin", "otlp or none"),
            ("OTEL_TRACES_SAMPLER", "jaeger_remote", "must be one of always_on"),
            ("OTEL_PROPAGATORS", "b3", "tracecontext"),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "0", "above 0"),
            ("OTEL_BSP_EXPORT_TIMEOUT", "-1", "above 0"),
            ("OTEL_SPAN_LINK_COUNT_LIMIT", "many", "above 0"),
        ] {
            let error = read(&[ENDPOINT, (name, value)]).unwrap_err();
            assert!(error.starts_with(name) && error.contains(said), "{error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn ratio_of_a_sampler_is_from_0_to_1() {
        let sampler = ("OTEL_TRACES_SAMPLER", "parentbased_traceidratio");
        for (ratio, valid) in [
            ("0", true),
            ("0.01", true),
            ("1", true),
            ("1.5", false),
            ("-1", false),
            ("NaN", false),
        ] {
            let given = [ENDPOINT, sampler, ("OTEL_TRACES_SAMPLER_ARG", ratio)];
            assert_eq!(read(&given).is_ok(), valid, "{ratio}");
        }
        let other =
            [ENDPOINT, ("OTEL_TRACES_SAMPLER", "always_on"), ("OTEL_TRACES_SAMPLER_ARG", "x")];
        assert!(read(&other).is_ok(), "this sampler has no ratio");
    }
}
