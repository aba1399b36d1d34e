//! A worker's configuration file: what is taken can be written and read again.

#![no_main]

use libfuzzer_sys::fuzz_target;
use millrace_crds::config::WorkerConfig;
use millrace_fuzz::folder_with;
use millrace_worker::config::{self, WorkerConfigError};

fuzz_target!(|data: &[u8]| {
    if let Ok(config) = read(data) {
        let text = serde_yaml::to_string(&config).expect("its own form");
        let again = read(text.as_bytes()).expect("its own form is taken");
        assert_eq!(serde_yaml::to_string(&again).expect("its own form"), text);
    }
});

fn read(data: &[u8]) -> Result<WorkerConfig, WorkerConfigError> {
    config::read(&folder_with("worker.yaml", data).join("worker.yaml"))
}
