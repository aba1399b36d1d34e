//! Recording a step: ops become commands, and neighbours that belong together become one.
//!
//! A norm between a product that adds (or the embedding) and a product that reads it is no kernel: the first leaves
//! values times weight and sums of squares, the second applies the factors of the rows. RoPE after the product of a
//! matrix whose rows are in pairs is no kernel either. Both look at the commands alone, so that a step is fused alike
//! whenever it is recorded. Pure.

use super::step::{Following, Leaving, Preceding, Product, StepCommand, Turn};
use crate::ops::Buffer;

/// What was recorded.
#[derive(Debug, Default)]
pub struct Recording {
    commands: Vec<StepCommand>,
    /// An operand that holds values times weight, and the norm that it lacks the factors of.
    unfinished: Option<(Buffer, Preceding)>,
}

impl Recording {
    /// The commands, in order.
    pub fn commands(&self) -> &[StepCommand] {
        &self.commands
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.commands.clear();
        self.unfinished = None;
    }

    /// Records a command that belongs to no neighbour.
    pub fn push(&mut self, command: StepCommand) {
        self.commands.push(command);
    }

    /// Records a command that writes a buffer and belongs to no neighbour.
    pub fn write(&mut self, out: Buffer, command: StepCommand) {
        self.overwritten(out);
        self.commands.push(command);
    }

    /// Records a factor on an embedding.
    ///
    /// # Panics
    /// When the embedding is not the command before.
    pub fn scale(&mut self, x: Buffer, by: f32) {
        match self.commands.last_mut() {
            Some(StepCommand::Embed { out, factor, .. }) if *out == x => *factor *= by,
            other => panic!("a factor on an embedding follows it at once, not {other:?}"),
        }
    }

    /// Records a norm over all heads of a product.
    pub fn norm_heads(&mut self, command: StepCommand, paired: impl Fn(usize) -> bool) {
        if let Some(StepCommand::Product(product)) = self.commands.last() {
            assert!(!paired(product.matrix), "sums in pairs are no rows of heads");
        }
        self.commands.push(command);
    }

    /// Records a norm, which may belong to its neighbours.
    pub fn norm(&mut self, x: Buffer, (weight, eps): (usize, f32), out: Buffer) {
        self.overwritten(out);
        self.commands.push(StepCommand::RmsNorm { x, weight, eps, out });
    }

    /// Records a product.
    pub fn product(&mut self, matrix: usize, bias: Option<usize>, x: Buffer, leaving: Leaving) {
        let before = self.preceding(x);
        if let Leaving::Values(out) | Leaving::SiluMul(out) | Leaving::GeluMul(out) | Leaving::Add(out, _) =
            leaving
        {
            assert!(x != out, "a product reads and writes two buffers");
            self.overwritten(out);
        }
        self.commands.push(StepCommand::Product(Product { matrix, bias, x, before, leaving }));
    }

    /// Records the head's product.
    pub fn head(&mut self, matrix: usize, x: Buffer) {
        let before = self.preceding(x);
        self.commands.push(StepCommand::Head { matrix, x, before });
    }

    /// Records RoPE; as part of the product before it, if that one's sums come in pairs of a head's elements.
    ///
    /// # Panics
    /// When they do, and the product is another one.
    pub fn rope(&mut self, qkv: Buffer, turn: Turn, paired: impl Fn(usize) -> bool) {
        if let Some(StepCommand::Product(product)) = self.commands.last_mut()
            && paired(product.matrix)
        {
            assert_eq!(product.leaving, Leaving::Values(qkv), "RoPE of another product than the one before");
            product.leaving = Leaving::Rope(turn);
        } else {
            self.commands.push(StepCommand::RopeCache { qkv, turn });
        }
    }

    /// What a product of this operand has to apply.
    fn preceding(&mut self, x: Buffer) -> Option<Preceding> {
        self.fuse(x);
        self.unfinished.filter(|(operand, _)| *operand == x).map(|(_, before)| before)
    }

    /// Makes a norm that was just recorded, and whose operand is about to be read, part of what is before it.
    fn fuse(&mut self, x: Buffer) {
        let [.., maker, StepCommand::RmsNorm { x: values, weight, eps, out }] = &mut self.commands[..] else {
            return;
        };
        let (values, eps, following) = (*values, *eps, Following { weight: *weight, out: *out });
        let after = match maker {
            StepCommand::Embed { out, after, .. } if *out == values => after,
            StepCommand::Product(Product { leaving: Leaving::Add(out, after), .. }) if *out == values => {
                after
            }
            _ => return,
        };
        if following.out != x {
            return;
        }
        *after = Some(following);
        self.commands.pop();
        self.unfinished = Some((x, Preceding { values, eps }));
    }

    fn overwritten(&mut self, buffer: Buffer) {
        if self.unfinished.is_some_and(|(operand, before)| operand == buffer || before.values == buffer) {
            self.unfinished = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{AttentionShape, KvScales};

    const RESIDUAL: Buffer = Buffer(0);
    const NORMED: Buffer = Buffer(1);
    const QKV: Buffer = Buffer(2);
    const GATED: Buffer = Buffer(3);

    fn turn() -> Turn {
        let shape = AttentionShape {
            heads: 2,
            kv_heads: 1,
            head_dim: 64,
            scale: 1.0,
            sliding_window: None,
            kv_scales: KvScales::ONE,
        };
        Turn { layer: 0, shape, norms: None, rope: Some(0) }
    }

    #[test]
    fn norms_and_rope_join_their_products() {
        let mut recording = Recording::default();
        recording.push(StepCommand::Embed { table: 0, factor: 1.0, out: RESIDUAL, after: None });
        recording.norm(RESIDUAL, (7, 1e-5), NORMED);
        recording.product(1, None, NORMED, Leaving::Values(QKV));
        recording.rope(QKV, turn(), |matrix| matrix == 1);
        recording.product(2, None, GATED, Leaving::Add(RESIDUAL, None));
        recording.norm(RESIDUAL, (8, 1e-6), NORMED);
        recording.product(3, None, NORMED, Leaving::SiluMul(GATED));
        recording.head(4, NORMED);
        let before = |eps| Some(Preceding { values: RESIDUAL, eps });
        let after = |weight| Some(Following { weight, out: NORMED });
        let product = |matrix, x, before, leaving| {
            StepCommand::Product(Product { matrix, bias: None, x, before, leaving })
        };
        assert_eq!(
            recording.commands(),
            [
                StepCommand::Embed { table: 0, factor: 1.0, out: RESIDUAL, after: after(7) },
                product(1, NORMED, before(1e-5), Leaving::Rope(turn())),
                product(2, GATED, None, Leaving::Add(RESIDUAL, after(8))),
                product(3, NORMED, before(1e-6), Leaving::SiluMul(GATED)),
                StepCommand::Head { matrix: 4, x: NORMED, before: before(1e-6) },
            ]
        );
    }

    #[test]
    fn what_has_no_such_neighbours_stays_a_kernel() {
        let mut recording = Recording::default();
        recording.product(1, None, GATED, Leaving::Add(RESIDUAL, None));
        recording.norm(RESIDUAL, (8, 1e-6), NORMED);
        recording.product(2, None, GATED, Leaving::Values(QKV));
        recording.rope(QKV, turn(), |_| false);
        recording.norm(QKV, (9, 1e-6), NORMED);
        recording.product(3, None, NORMED, Leaving::SiluMul(GATED));
        assert_eq!(recording.commands().len(), 6);
        let none = recording.commands().iter().all(|command| match command {
            StepCommand::Product(product) => product.before.is_none(),
            _ => true,
        });
        assert!(none);
    }

    #[test]
    fn factors_are_forgotten_when_their_values_change() {
        let mut recording = Recording::default();
        recording.push(StepCommand::Embed { table: 0, factor: 1.0, out: RESIDUAL, after: None });
        recording.norm(RESIDUAL, (7, 1e-5), NORMED);
        recording.product(1, None, NORMED, Leaving::Values(QKV));
        recording.product(2, None, GATED, Leaving::Values(NORMED));
        recording.product(3, None, NORMED, Leaving::Values(QKV));
        let Some(StepCommand::Product(last)) = recording.commands().last() else { panic!() };
        assert_eq!(last.before, None);
    }

    #[test]
    fn embeddings_take_their_factor_and_norms_behind_branches_stay_kernels() {
        let mut recording = Recording::default();
        recording.push(StepCommand::Embed { table: 0, factor: 1.0, out: RESIDUAL, after: None });
        recording.scale(RESIDUAL, 24.0);
        recording.norm(RESIDUAL, (7, 1e-5), NORMED);
        recording.product(1, None, NORMED, Leaving::Values(QKV));
        let add = StepCommand::NormAdd { x: QKV, weight: 9, eps: 1e-5, residual: RESIDUAL };
        recording.write(RESIDUAL, add);
        recording.norm(RESIDUAL, (8, 1e-5), NORMED);
        recording.product(2, None, NORMED, Leaving::GeluMul(GATED));
        let after = Some(Following { weight: 7, out: NORMED });
        let product = |matrix, before, leaving| {
            StepCommand::Product(Product { matrix, bias: None, x: NORMED, before, leaving })
        };
        let before = Some(Preceding { values: RESIDUAL, eps: 1e-5 });
        assert_eq!(
            recording.commands(),
            [
                StepCommand::Embed { table: 0, factor: 24.0, out: RESIDUAL, after },
                product(1, before, Leaving::Values(QKV)),
                add,
                StepCommand::RmsNorm { x: RESIDUAL, weight: 8, eps: 1e-5, out: NORMED },
                product(2, None, Leaving::GeluMul(GATED)),
            ]
        );
    }
}
