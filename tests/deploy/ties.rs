//! Facts that several places must agree on. They are the ports in the image, the container, its
//! probes and the Services, and the files in variables, mounts and Secrets.

use serde_json::Value;

use crate::{
    chart::INSTALLATIONS,
    helm::{self, container, one},
};

const DOCKERFILE: &str = include_str!("../../deploy/Dockerfile");
const VALUES: &str = include_str!("../../deploy/helm/fetch-proxy/values.yaml");

/// The port of this variable of the image.
fn of_the_image(variable: &str) -> u64 {
    let (_, rest) = DOCKERFILE.split_once(&format!("{variable}=[::]:")).unwrap();
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap()
}

#[test]
fn ports_agree_everywhere() {
    let (grpc, ops) =
        (of_the_image(" FETCH_PROXY_LISTEN"), of_the_image(" FETCH_PROXY_OPS_LISTEN"));
    assert!(DOCKERFILE.contains(&format!("EXPOSE {grpc} {ops}\n")));
    for (name, values) in INSTALLATIONS {
        let objects = helm::objects(values);
        let container = container(&objects);
        let ports = container["ports"].as_array().unwrap().iter();
        let ports: Vec<_> = ports.map(|port| (&port["name"], &port["containerPort"])).collect();
        assert_eq!(ports, [(&"grpc".into(), &grpc.into()), (&"ops".into(), &ops.into())], "{name}");
        for probe in ["startupProbe", "readinessProbe", "livenessProbe"] {
            assert_eq!(container[probe]["grpc"]["port"], ops, "{name}: {probe}");
        }
        let headless = objects.iter().filter(|object| object["spec"]["clusterIP"] == "None");
        for service in headless {
            assert_eq!(service["spec"]["ports"][0]["port"], grpc, "{name}");
        }
        for variable in container["env"].as_array().unwrap() {
            let moved = variable["name"].as_str().unwrap().ends_with("LISTEN");
            assert!(!moved, "{name}: {variable}");
        }
    }
}

#[test]
fn every_named_file_is_mounted_from_its_secret() {
    for (name, values) in INSTALLATIONS {
        let objects = helm::objects(values);
        let pod = &one(&objects, "Deployment")["spec"]["template"]["spec"];
        let (container, volumes) = (container(&objects), pod["volumes"].as_array().unwrap());
        let mounts = container["volumeMounts"].as_array().unwrap();
        // A file that is mounted by itself does not change with its Secret.
        assert!(mounts.iter().all(|mount| mount["subPath"].is_null()), "{name}");
        let mut used = 0;
        for variable in container["env"].as_array().unwrap() {
            let key = &variable["valueFrom"]["secretKeyRef"];
            if let Some(entry) = key["key"].as_str() {
                let made = made(&objects, &key["name"]).is_none_or(|made| made[entry].is_string());
                assert!(made, "{name}: {variable}");
            }
            let Some(path) = variable["value"].as_str().filter(|value| value.starts_with('/'))
            else {
                continue;
            };
            let (folder, entry) = path.rsplit_once('/').unwrap();
            let mount = mounts.iter().find(|mount| mount["mountPath"] == folder);
            let mount = mount.unwrap_or_else(|| panic!("{name}: {path} is not mounted"));
            let volume = volumes.iter().find(|volume| volume["name"] == mount["name"]).unwrap();
            let made: Vec<_> =
                sources(volume).iter().filter_map(|source| made(&objects, source)).collect();
            match made[..] {
                // The comment says which keys it must have.
                [] => assert!(VALUES.contains(&format!("`{entry}`")), "{name}: {entry}"),
                _ => {
                    assert!(made.iter().any(|entries| !entries[entry].is_null()), "{name}: {entry}")
                }
            }
            used += 1;
        }
        // A policy names the files of this folder.
        let of_policies = "/var/run/secrets/fetch-proxy/api";
        assert!(VALUES.contains(of_policies));
        let named = mounts.iter().filter(|mount| mount["mountPath"] != of_policies).count();
        assert!(used >= named, "{name}: what is mounted is used");
    }
}

/// The names of the objects whose entries are the files of a volume.
fn sources(volume: &Value) -> Vec<&Value> {
    let projected = volume["projected"]["sources"].as_array();
    let sources: Vec<&Value> =
        projected.map_or_else(|| vec![volume], |sources| sources.iter().collect());
    let names = ["/secret/secretName", "/secret/name", "/configMap/name"];
    assert!(sources.iter().all(|source| source.pointer("/secret/items").is_none()));
    let named = sources.into_iter();
    named.filter_map(|source| names.iter().find_map(|path| source.pointer(path))).collect()
}

/// The entries of a Secret or of a ConfigMap, where the chart makes it.
fn made<'a>(objects: &'a [Value], name: &Value) -> Option<&'a Value> {
    let entries = |object: &'a Value| {
        let kinds = [("Secret", "stringData"), ("ConfigMap", "data")];
        let (_, entries) = kinds.iter().find(|(kind, _)| object["kind"] == *kind)?;
        (object["metadata"]["name"] == *name).then(|| &object[entries])
    };
    objects.iter().find_map(entries)
}
