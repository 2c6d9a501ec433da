//! Values that the chart refuses, because they cannot work.

use crate::{
    chart::variable_of,
    helm::{self, LEAST, container},
};

const KEYS: &str = "tokenKeys.secret=fetch-proxy-token-keys";
/// A policy that lets strangers in.
const POLICY: &str = "access.policy=authenticate: {anonymous: true}";

#[test]
fn impossible_values_are_refused_with_advice() {
    for (values, said) in [
        (&["security.insecure=true"][..], "fetch-proxy keygen"),
        (&[KEYS], "callers would need no credential: set access.policy"),
        (&[KEYS, "security.plaintext=true"], "callers would need no credential"),
        (&[KEYS, "tls.secret=a"], "callers would need no credential"),
        (
            &[KEYS, "tls.secret=a", "tls.clientCASecret=b", "tls.clientAuth=optional"],
            "callers would need no credential",
        ),
        (&[KEYS, "access.policySecret=a"], "the port would have no TLS: set tls.secret"),
        (&[KEYS, POLICY, "security.plaintext=true"], "access.policy says `anonymous: true`"),
        (&[KEYS, POLICY, "tls.secret=a"], "access.policy says `anonymous: true`"),
        (&[LEAST, "access.policy=a: ["], "access.policy is not YAML"),
        (&[LEAST, "access.policysecret=a"], "policysecret"),
        (&[LEAST, "access.policy=a: b", "access.policySecret=a"], "set one of access.policy"),
        (&[LEAST, "access.policyConfigMap=a", "access.policySecret=a"], "set one of access.policy"),
        (&[LEAST, "access.apiKeysSecret=a"], "access.apiKeysSecret and access.apiServer need"),
        (
            &[LEAST, "access.apiServer.enabled=true", "networkPolicy.enabled=false"],
            "access.apiKeysSecret and access.apiServer need",
        ),
        (
            &[LEAST, "access.policySecret=a", "access.apiServer.enabled=true"],
            "access.apiServer.peers must name the addresses of the API server",
        ),
        (&[LEAST, "tokenKeys.keys={a}"], "not both"),
        (&[LEAST, "nats.auth.method=creds"], "nats.auth.secret is needed for the method creds"),
        (&[LEAST, "nats.auth.secret=a"], "nats.auth.method"),
        (&[LEAST, "tls.clientCASecret=a"], "need a certificate: set tls.secret"),
        (&[LEAST, "tls.clientCAConfigMap=a"], "need a certificate: set tls.secret"),
        (&[LEAST, "tls.secret=a", "tls.clientCASecret=a", "tls.clientCAConfigMap=a"], "not both"),
        (&[LEAST, "tls.secret=a", "tls.certManager.enabled=true"], "not both"),
        (&[LEAST, "tls.certManager.enabled=true"], "tls.certManager.issuer.name is needed"),
        (&[LEAST, "tls.secret=a", "tls.minVersion=1.1"], "/tls/minVersion"),
        (&[LEAST, "tls.secret=a", "tls.clientAuth=no"], "/tls/clientAuth"),
        (
            &[LEAST, "nats.auth.method=password", "nats.auth.entries.username=a"],
            "nats.auth.entries.password is needed for the method password",
        ),
        (
            &[LEAST, "nats.auth.method=creds", r"nats.auth.entries.nkey\.seed=SUA"],
            "nats.auth.entries.nats.creds is needed",
        ),
        (
            &[LEAST, "metrics.podMonitor.enabled=true"],
            "name the peers of Prometheus in networkPolicy.operators",
        ),
        (
            &[LEAST, "metrics.podMonitor.enabled=true", "settings.metrics=off"],
            "metrics.podMonitor needs the metrics",
        ),
        (
            &[LEAST, "metrics.rules.enabled=true", "metrics.rules.disabled={FetchProxyUp}"],
            "there is no alert FetchProxyUp. There are FetchProxyDown, ",
        ),
        (&[LEAST, "otel.endpoint=collector:4317"], "/otel/endpoint"),
        (&[LEAST, "otel.endpoint=ftp://collector"], "/otel/endpoint"),
        (&[LEAST, "otel.endpoint=http://user:secret@collector"], "/otel/endpoint"),
        (&[LEAST, "otel.samplerRatio=2"], "/otel/samplerRatio"),
        (&[LEAST, "nats.url=nats"], "/nats/url"),
        (&[LEAST, "nats.url=wss://nats"], "/nats/url"),
        (&[LEAST, "nats.url=nats://nats:14222"], "14222 of nats.url"),
        (&[LEAST, "nats.url=tls://u:p@a\\,tls://[::1]:4333"], "4333 of nats.url"),
        (&[LEAST, "nats.url=nats://nats", "networkPolicy.nats.ports=[4333]"], "4222 of nats.url"),
        (&[LEAST, "settings.maxLeese=1h"], "maxLeese"),
        (&[LEAST, "settings.maxLease=long"], "/settings/maxLease"),
        (&[LEAST, "settings.maxLease=10foo"], "/settings/maxLease"),
        (&[LEAST, "settings.maxLease=500ms"], "/settings/maxLease"),
        (&[LEAST, "settings.maxLease=0s"], "/settings/maxLease"),
        (&[LEAST, "settings.settleTimeout=99ms"], "/settings/settleTimeout"),
        (&[LEAST, "settings.maxConnectionAge=1x"], "/settings/maxConnectionAge"),
        (
            &[LEAST, "autoscaling.enabled=true", "autoscaling.minReplicas=11"],
            "autoscaling.minReplicas is more than autoscaling.maxReplicas",
        ),
        (&[LEAST, "drain.delaySeconds=5s"], "/drain/delaySeconds"),
        (&[LEAST, "replicaCount=3"], "replicaCount"),
        (&[LEAST, "cluster=a.b"], "/cluster"),
        (&[LEAST, "networkPolicy.clients=null"], "networkPolicy.enabled=false"),
        // To Kubernetes, nobody in particular is everybody.
        (&[LEAST, "networkPolicy.clients=[]"], "/networkPolicy/clients"),
    ] {
        let output = helm::template(values);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{values:?} was taken");
        assert!(error.contains(said), "{values:?}: {error}");
    }
}

/// Times are as the program takes them: what the schema lets through, it does not refuse.
#[test]
fn program_accepts_every_time_that_the_schema_accepts() {
    for (setting, times) in [
        ("maxLease", &["1s", "90m", "1h 30m", "2h30m", "1d"][..]),
        ("maxConnectionAge", &["0s", "10m"]),
        ("settleTimeout", &["100ms", "2s 500ms", "1m"]),
    ] {
        for time in times {
            let objects = helm::objects(&[LEAST, &format!("settings.{setting}={time}")]);
            let env = container(&objects)["env"].as_array().unwrap();
            let variable = env.iter().find(|variable| variable["name"] == variable_of(setting));
            let value = variable.unwrap()["value"].as_str().unwrap();
            let mut serve = std::process::Command::new(env!("CARGO_BIN_EXE_fetch-proxy"));
            // The next argument on the command line is wrong, and is read later.
            serve.args(["serve", "--token-key-file", "/nowhere"]).env(variable_of(setting), value);
            let said = String::from_utf8(serve.output().unwrap().stderr).unwrap();
            assert!(said.contains("/nowhere"), "{setting}={time}: {said}");
        }
    }
}
