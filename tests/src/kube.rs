//! A real Kubernetes for the tests and the demo: control plane, node, chart, audit log, all on loopback.
//!
//! The control plane is the real one, with certificates, RBAC and admission on. The node is the harness's own: it
//! runs a pod's containers as processes of this machine and is made for tests and the demo only.

pub mod audit;
pub mod cluster;
pub mod control_plane;
pub mod faults;
pub mod helm;
pub mod node;
pub mod operator;
pub mod platform;
pub mod programs;
pub mod timeline;
