//! The harness: real servers and workers as child processes, for the tests and the demo.
//!
//! Every child dies with the process that started it, keeps its state in a temporary folder of its own and
//! listens on 127.0.0.1 only. The harness refuses to start a child whose program is missing and says how to
//! get it; it never looks for a program outside the tools' cache and the build folder.
//!
//! Starting, killing and waiting for a child block the thread, so async tests run on several threads.

pub mod accounts;
pub mod bulk;
pub mod certificates;
pub mod chaos;
pub mod chat;
pub mod checkpoint;
pub mod cluster;
pub mod demo;
pub mod door;
pub mod figures;
pub mod gateway;
pub mod http;
pub mod jobs;
#[cfg(feature = "cluster")]
pub mod kube;
pub mod model;
pub mod nats;
pub mod overhead;
pub mod place;
pub mod ports;
pub mod process;
pub mod pulling;
pub mod random;
pub mod s3;
pub mod scripted;
pub mod source;
pub mod tiny;
pub mod tools;
pub mod worker;
