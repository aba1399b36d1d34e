//! Whom workers may talk to: broker, object stores and DNS, and nobody else.
//!
//! A NetworkPolicy knows addresses and namespaces, not host names. A name of a Service inside of the cluster
//! becomes its namespace, an address becomes itself, and any other name becomes its port alone. Pure.

use std::collections::BTreeSet;
use std::net::IpAddr;

use k8s_openapi::api::networking::v1::{
    IPBlock, NetworkPolicyEgressRule, NetworkPolicyIngressRule, NetworkPolicyPeer, NetworkPolicyPort,
    NetworkPolicySpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use millrace_crds::config::{StoreConfig, WorkerConfig};

use crate::names;
use crate::worker_config::PORT;

/// The port of DNS.
const DNS_PORT: u16 = 53;
/// The port of a NATS server whose address names none.
const NATS_PORT: u16 = 4222;
/// The port of `https`.
const HTTPS_PORT: u16 = 443;
/// The port of `http`.
const HTTP_PORT: u16 = 80;

/// Someone that workers talk to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Peer {
    /// Where.
    pub place: PeerPlace,
    /// The TCP port.
    pub port: u16,
}

/// Where a peer is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum PeerPlace {
    /// In a namespace of this cluster.
    Namespace(String),
    /// At an address.
    Address(IpAddr),
    /// At a name that only DNS knows.
    Anywhere,
}

/// The peers that a configuration names, each once.
pub fn peers(worker: &WorkerConfig) -> Vec<Peer> {
    let own = worker.model.namespace.as_str();
    let mut found = BTreeSet::new();
    for server in &worker.nats.servers {
        found.insert(peer(server, NATS_PORT, own));
    }
    if let Some(monitor) = &worker.nats.monitor {
        found.insert(peer(monitor, HTTP_PORT, own));
    }
    if worker.model.uri.starts_with("s3://") {
        found.extend(store(&worker.model.store, own));
    }
    if let Some(results) = &worker.results.object_store {
        found.extend(store(&results.store, own));
    }
    found.into_iter().collect()
}

/// The service and that of its tokens, or the proxy in front of both.
fn store(store: &StoreConfig, own: &str) -> Vec<Peer> {
    if let Some(proxy) = &store.proxy {
        return vec![peer(proxy, HTTP_PORT, own)];
    }
    let of = |endpoint: &Option<String>| match endpoint {
        Some(endpoint) => peer(endpoint, HTTPS_PORT, own),
        None => Peer { place: PeerPlace::Anywhere, port: HTTPS_PORT },
    };
    let tokens = store.web_identity.as_ref().map(|identity| of(&identity.endpoint));
    [Some(of(&store.endpoint)), tokens].into_iter().flatten().collect()
}

/// Reads `scheme://host:port`. What it cannot read it leaves open, because a closed door would be a riddle.
fn peer(address: &str, default_port: u16, own: &str) -> Peer {
    let (scheme, rest) = address.split_once("://").unwrap_or(("", address));
    let authority = rest.split('/').next().unwrap_or_default();
    let default_port = match scheme {
        "http" | "ws" => HTTP_PORT,
        "https" | "wss" => HTTPS_PORT,
        _ => default_port,
    };
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, port.parse().unwrap_or(default_port)),
        _ => (authority, default_port),
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    Peer { place: place(host, own), port }
}

fn place(host: &str, own: &str) -> PeerPlace {
    if let Ok(address) = host.parse() {
        return PeerPlace::Address(address);
    }
    let parts: Vec<&str> = host.split('.').collect();
    match parts.as_slice() {
        [_] => PeerPlace::Namespace(own.to_owned()),
        [_, namespace] | [_, namespace, "svc", ..] | [_, _, namespace, "svc", ..] => {
            PeerPlace::Namespace((*namespace).to_owned())
        }
        _ => PeerPlace::Anywhere,
    }
}

/// The policy of a model's pods: in comes who reads metrics, out go broker, stores and DNS.
pub fn policy(model: &str, peers: &[Peer]) -> NetworkPolicySpec {
    let mut egress: Vec<NetworkPolicyEgressRule> = peers
        .iter()
        .map(|peer| NetworkPolicyEgressRule {
            ports: Some(vec![port("TCP", peer.port)]),
            to: destination(&peer.place),
        })
        .collect();
    egress.push(NetworkPolicyEgressRule {
        ports: Some(vec![port("UDP", DNS_PORT), port("TCP", DNS_PORT)]),
        to: None,
    });
    NetworkPolicySpec {
        pod_selector: Some(names::label_selector(model)),
        policy_types: Some(vec!["Ingress".into(), "Egress".into()]),
        ingress: Some(vec![NetworkPolicyIngressRule { ports: Some(vec![port("TCP", PORT)]), from: None }]),
        egress: Some(egress),
    }
}

fn port(protocol: &str, port: u16) -> NetworkPolicyPort {
    NetworkPolicyPort {
        protocol: Some(protocol.into()),
        port: Some(IntOrString::Int(port.into())),
        ..NetworkPolicyPort::default()
    }
}

fn destination(place: &PeerPlace) -> Option<Vec<NetworkPolicyPeer>> {
    match place {
        PeerPlace::Anywhere => None,
        PeerPlace::Address(address) => {
            let bits = if address.is_ipv4() { 32 } else { 128 };
            let block = IPBlock { cidr: format!("{address}/{bits}"), except: None };
            Some(vec![NetworkPolicyPeer { ip_block: Some(block), ..NetworkPolicyPeer::default() }])
        }
        PeerPlace::Namespace(name) => {
            let label = ("kubernetes.io/metadata.name".to_owned(), name.clone());
            let selector = LabelSelector {
                match_labels: Some([label].into_iter().collect()),
                ..LabelSelector::default()
            };
            Some(vec![NetworkPolicyPeer {
                namespace_selector: Some(selector),
                ..NetworkPolicyPeer::default()
            }])
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn addresses_become_places() {
        let namespace = |name: &str| PeerPlace::Namespace(name.into());
        let known = [
            ("nats://nats:4222", namespace("own"), 4222),
            ("nats://nats", namespace("own"), 4222),
            ("nats://nats-0.nats.queues.svc.cluster.local:4333", namespace("queues"), 4333),
            ("http://s3.storage.svc:8333", namespace("storage"), 8333),
            ("https://s3.eu-west-1.amazonaws.com", PeerPlace::Anywhere, 443),
            ("nats://10.0.0.7:4222", PeerPlace::Address("10.0.0.7".parse().unwrap()), 4222),
            ("tls://[fd00::1]:4222", PeerPlace::Address("fd00::1".parse().unwrap()), 4222),
        ];
        // Guesses, written down and not promised: a name of two labels may be a host outside of the cluster, and a
        // policy is about the ports of pods, which need not be those of their Service.
        let guessed = [
            ("nats://nats.queues", namespace("queues"), 4222),
            ("http://s3.storage.svc", namespace("storage"), 80),
        ];
        for (address, place, port) in known.into_iter().chain(guessed) {
            assert_eq!(peer(address, NATS_PORT, "own"), Peer { place, port }, "{address}");
        }
    }

    #[test]
    fn each_place_gets_a_door_of_its_own_and_dns_one() {
        let peers = ["nats://nats.queues.svc", "nats://10.0.0.7:4333", "https://s3.eu-west-1.amazonaws.com"]
            .map(|address| peer(address, NATS_PORT, "own"));
        let policy = serde_json::to_value(policy("m", &peers)).unwrap();
        let door = |port: u16, to: Value| {
            let mut door = json!({"ports": [{"protocol": "TCP", "port": port}]});
            if !to.is_null() {
                door["to"] = json!([to]);
            }
            door
        };
        let queues = json!({"kubernetes.io/metadata.name": "queues"});
        let doors = json!([
            door(4222, json!({"namespaceSelector": {"matchLabels": queues}})),
            door(4333, json!({"ipBlock": {"cidr": "10.0.0.7/32"}})),
            door(443, Value::Null),
            {"ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]},
        ]);
        assert_eq!(policy["egress"], doors);
        assert_eq!(policy["policyTypes"], json!(["Ingress", "Egress"]), "what no door names is shut");
    }
}
