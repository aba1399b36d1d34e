//! The wider families and position embeddings against transformers, on tiny models whose weights follow from names.
//!
//! `golden/families/make.py` makes the logits with transformers 5.24.0. Errors are measured as in `right.rs`.

mod bare;

use std::path::Path;

use anyhow::{Context, Result};
use bare::{BF16, Bare, Bound, Error, F32, FP8_KV, INT8, Types, error};
use millrace_engine::model::config::{DecoderConfig, GateActivation, NormPlaces, QkNorms};
use millrace_engine::model::rope::RopeScaling;
use millrace_kernels::isa::Isa;

use millrace_tests::checkpoint;
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
struct Golden {
    tokens: Vec<u32>,
    positions: Vec<usize>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    config: Value,
    /// Longest context that is served: LongRoPE chooses by it.
    served: usize,
    /// Of each of the positions.
    logits: Vec<Vec<f32>>,
}

fn golden() -> Result<Golden> {
    Ok(serde_json::from_str(include_str!("golden/families/expected.json"))?)
}

/// Errors of a configuration on the weights of a folder, one prefill and the same in chunks.
fn check(
    golden: &Golden,
    case: &Case,
    (config, folder): (&DecoderConfig, &Path),
    kind: (Types, Isa),
) -> Result<Error> {
    let mut ours = Bare::of(config, folder, kind, case.served)?;
    let whole = ours.logits(&golden.tokens, &[golden.tokens.len()])?;
    for chunks in [vec![1; golden.tokens.len()], vec![16, 1, 1, 17, 5]] {
        let again = ours.logits(&golden.tokens, &chunks)?;
        let bits = |rows: &[Vec<f32>]| rows.concat().iter().map(|logit| logit.to_bits()).collect::<Vec<_>>();
        anyhow::ensure!(bits(&again) == bits(&whole), "chunks {chunks:?} give other bytes than one prefill");
    }
    let picked: Vec<f32> = golden.positions.iter().flat_map(|&at| whole[at].clone()).collect();
    Ok(error(&picked, &case.logits.concat()))
}

/// A folder of a case, stored in this type.
fn folder(case: &Case, stored: &str) -> Result<tempfile::TempDir> {
    let folder = tempfile::tempdir()?;
    let mut config = case.config.clone();
    config["torch_dtype"] = json!(stored);
    checkpoint::write_named(folder.path(), &config)?;
    Ok(folder)
}

#[test]
fn each_family_computes_what_transformers_computes() -> Result<()> {
    let golden = golden()?;
    for case in &golden.cases {
        for (stored, kinds) in [("float32", &[F32][..]), ("bfloat16", &[BF16, INT8, FP8_KV][..])] {
            let folder = folder(case, stored)?;
            let config = DecoderConfig::read(folder.path())?;
            for &types in kinds {
                for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
                    let about = || format!("{}, {types:?}, {isa}", case.name);
                    let worst =
                        check(&golden, case, (&config, folder.path()), (types, isa)).with_context(about)?;
                    println!("{}: {worst}", about());
                    anyhow::ensure!(worst.within(Bound::of(types)), "{}: {worst}", about());
                }
            }
        }
    }
    Ok(())
}

/// What a decoder may forget: the case, and the part.
type Forgotten = (&'static str, fn(&mut DecoderConfig));

#[test]
fn each_forgotten_part_is_found_in_every_precision() -> Result<()> {
    let forgotten: [Forgotten; 18] = [
        ("gemma3", |config| config.norm_offset = 0.0),
        ("gemma3", |config| config.embedding_scale = 1.0),
        ("gemma3", |config| config.windows.fill(None)),
        ("gemma3", |config| config.activation = GateActivation::Silu),
        ("gemma3", |config| config.norms = NormPlaces::Before),
        ("gemma3, capped logits", |config| config.logits_cap = None),
        ("gemma2, low caps, biases", |config| config.logits_cap = None),
        ("gemma2, low caps, biases", |config| config.score_cap = None),
        ("gemma2", |config| config.windows.fill(None)),
        ("gemma3, scaled full layers", |config| config.rope_of.fill(Some(0))),
        ("phi3, window", |config| config.windows.fill(None)),
        ("phi3, long contexts", |config| config.ropes[0].scaling = RopeScaling::None),
        ("smollm3, most layers without RoPE", |config| config.rope_of.fill(Some(0))),
        ("olmo2", |config| config.qk_norm = QkNorms::None),
        ("granite", |config| config.branch_scale = 1.0),
        ("gemma3", |config| config.attention_scale = 1.0),
        ("granite", |config| config.logits_divisor = 1.0),
        ("llama, yarn", |config| config.ropes[0].scaling = RopeScaling::None),
    ];
    let golden = golden()?;
    for (name, forget) in forgotten {
        let case = golden.cases.iter().find(|case| case.name == name).context(name)?;
        for (stored, kinds) in [("float32", &[F32][..]), ("bfloat16", &[BF16, INT8, FP8_KV][..])] {
            let folder = folder(case, stored)?;
            let mut config = DecoderConfig::read(folder.path())?;
            forget(&mut config);
            for &types in kinds {
                let found = check(&golden, case, (&config, folder.path()), (types, Isa::detect()));
                let worst = found.with_context(|| name)?;
                println!("{name}, {types:?}: {worst}");
                let unseen = worst.within(Bound::of(types));
                anyhow::ensure!(!unseen, "{name} in {types:?} differs by {worst} only");
            }
        }
    }
    Ok(())
}
