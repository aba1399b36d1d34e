//! Scales of keys and values of an 8-bit cache, as checkpoints carry them: one number per layer for each.
//!
//! The names are those that vLLM reads (ModelOpt's, those of fused projections, compressed-tensors' new and old ones,
//! and the old common `kv_scale`). A layer without scales has 1; one with a scale of its keys alone uses it for
//! both. Refused: a scale of
//! more than one element, one that is not above 0 and finite, and values with a scale where keys have none.

use millrace_kernels::ops::KvScales;
use millrace_kernels::tensor::{DType, HostTensor};

use super::binding::{BindError, load_error};
use super::source::{StoredDtype, TensorSource};

/// Where the scale of keys may stand, after the layer's prefix. That of values has `v` for each `k`.
const KEY_NAMES: [&str; 5] =
    ["k_proj.k_scale", "qkv_proj.k_scale", "k_scale", "attn.k_scale", "k_proj.output_scale"];
const VALUE_NAMES: [&str; 5] =
    ["v_proj.v_scale", "qkv_proj.v_scale", "v_scale", "attn.v_scale", "v_proj.output_scale"];
/// One scale for both.
const COMMON_NAME: &str = "kv_scale";

/// The scales of a layer.
///
/// # Errors
/// When the checkpoint's scales make no sense; the error names the tensor.
pub fn kv_scales(source: &dyn TensorSource, layer: usize) -> Result<KvScales, BindError> {
    let name = |part: &str| format!("model.layers.{layer}.self_attn.{part}");
    let first = |parts: &[&str]| parts.iter().map(|part| name(part)).find(|name| source.has(name));
    let (key, value) = (first(&KEY_NAMES), first(&VALUE_NAMES));
    match (key.or_else(|| first(&[COMMON_NAME])), value) {
        (None, None) => Ok(KvScales::ONE),
        (None, Some(value)) => Err(BindError::Alone { name: value, missing: name(KEY_NAMES[0]) }),
        (Some(key), value) => {
            let key = read(source, &key)?;
            Ok(KvScales { key, value: value.map_or(Ok(key), |name| read(source, &name))? })
        }
    }
}

fn read(source: &dyn TensorSource, name: &str) -> Result<f32, BindError> {
    let stored = source.tensor(name)?;
    if stored.shape.iter().any(|&dimension| dimension != 1) {
        return Err(BindError::Shape { name: name.to_owned(), found: stored.shape, expected: Vec::new() });
    }
    let dtype = match stored.dtype {
        StoredDtype::F32 => DType::F32,
        StoredDtype::F16 => DType::F16,
        StoredDtype::Bf16 => DType::Bf16,
    };
    let tensor = HostTensor::new(dtype, &[1], stored.data).map_err(|source| load_error(name, source))?;
    let mut scale = [0.0];
    tensor.read_f32(0, &mut scale);
    // Its inverse is multiplied with, so that has to be finite, too.
    if scale[0] > 0.0 && scale[0].is_finite() && (1.0 / scale[0]).is_finite() {
        Ok(scale[0])
    } else {
        Err(BindError::Scale { name: name.to_owned(), value: scale[0] })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::model::source::{SourceError, StoredTensor};

    struct Named(HashMap<String, (Vec<usize>, Vec<u8>)>);

    impl TensorSource for Named {
        fn tensor(&self, name: &str) -> Result<StoredTensor<'_>, SourceError> {
            let (shape, data) = self.0.get(name).ok_or_else(|| SourceError::Missing(name.to_owned()))?;
            Ok(StoredTensor { dtype: StoredDtype::F32, shape: shape.clone(), data })
        }
    }

    /// Name after the layer's prefix, shape, and the value of all elements.
    type Tensor<'a> = (&'a str, &'a [usize], f32);

    fn of(tensors: &[Tensor<'_>]) -> Result<KvScales, BindError> {
        let entry = |&(part, shape, value): &Tensor<'_>| {
            let elements = shape.iter().product::<usize>();
            let data = (0..elements).flat_map(|_| value.to_le_bytes()).collect();
            (format!("model.layers.3.self_attn.{part}"), (shape.to_vec(), data))
        };
        kv_scales(&Named(tensors.iter().map(entry).collect()), 3)
    }

    #[test]
    fn scales_are_read_by_each_of_their_names() {
        let cases: &[(&[Tensor<'_>], (f32, f32))] = &[
            (&[], (1.0, 1.0)),
            (&[("k_proj.k_scale", &[], 0.5), ("v_proj.v_scale", &[1], 0.25)], (0.5, 0.25)),
            (&[("k_scale", &[1], 2.0), ("v_scale", &[], 3.0)], (2.0, 3.0)),
            (&[("attn.k_scale", &[], 2.0), ("attn.v_scale", &[1, 1], 3.0)], (2.0, 3.0)),
            (&[("qkv_proj.k_scale", &[], 2.0), ("qkv_proj.v_scale", &[], 3.0)], (2.0, 3.0)),
            (&[("k_proj.output_scale", &[], 2.0), ("v_proj.output_scale", &[1], 3.0)], (2.0, 3.0)),
            (&[("kv_scale", &[], 0.125)], (0.125, 0.125)),
            (&[("k_scale", &[], 0.125)], (0.125, 0.125)),
        ];
        for (tensors, (key, value)) in cases {
            assert_eq!(of(tensors).unwrap(), KvScales { key: *key, value: *value }, "{tensors:?}");
        }
    }

    #[test]
    fn senseless_scales_are_refused_by_name() {
        let cases: &[(&[Tensor<'_>], &str)] = &[
            (&[("k_scale", &[2], 1.0)], "self_attn.k_scale\" has shape [2]"),
            (&[("k_scale", &[], 0.0)], "self_attn.k_scale\" is 0"),
            (&[("k_scale", &[], -1.0)], "is -1"),
            (&[("k_scale", &[], f32::NAN)], "NaN"),
            (&[("k_scale", &[], f32::INFINITY)], "inf"),
            (&[("k_scale", &[], 1e-39)], "above 0"),
            (&[("v_scale", &[], 1.0)], "k_proj.k_scale"),
        ];
        for (tensors, expected) in cases {
            let error = of(tensors).unwrap_err().to_string();
            assert!(error.contains(expected), "{tensors:?}: {error}");
        }
    }
}
