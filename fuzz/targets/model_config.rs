//! A model's `config.json`: what is taken has sizes that the engine can compute with.

#![no_main]

use libfuzzer_sys::fuzz_target;
use millrace_engine::model::config::DecoderConfig;

fuzz_target!(|text: &str| {
    if let Ok(config) = DecoderConfig::parse(text, None) {
        assert!(config.heads % config.kv_heads == 0 && config.head_dim % 2 == 0 && config.layers() > 0);
        assert!(config.parameters() > 0 && config.qkv_width() > 0);
        let plans = config.ropes.iter().map(|rope| rope.plan(config.head_dim, 64));
        assert!(plans.flat_map(|plan| plan.inverse_frequencies).all(f32::is_finite));
    }
});
