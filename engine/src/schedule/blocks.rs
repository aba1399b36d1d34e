//! The pool of KV blocks: who holds each block, which blocks hold a known prefix, which may be taken next.
//!
//! A block is held by as many sequences as its reference count says. A full block whose tokens are known is
//! *registered*: a later sequence with the same prefix shares it instead of computing it. Blocks that nobody
//! holds stay registered until they are taken for something else, the least recently used first.
//!
//! Invariants: a block is in the free list exactly when its count is 0; a chain id stands for one token
//! prefix for ever, so that a hit never rests on a hash alone (the block's tokens and the chain of its parent
//! are compared too). Pure: no clock, no randomness, no allocation after the pool is made.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// Index of a KV block.
pub type BlockId = u32;

/// Identifies the whole token prefix that ends with a registered block. Never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Chain(u64);

impl Chain {
    /// The empty prefix.
    pub const ROOT: Chain = Chain(0);
}

/// Hash of a token prefix that fills whole blocks.
pub type PrefixHash = u64;

/// Hash of the empty prefix.
pub const PREFIX_ROOT: PrefixHash = 0x243f_6a88_85a3_08d3;

/// Continues a prefix hash by one block of tokens.
///
/// Multiply and fold, as wyhash mixes; it only has to spread, since hits are compared token by token.
pub fn extend_hash(parent: PrefixHash, tokens: &[u32]) -> PrefixHash {
    tokens.iter().fold(parent, |hash, &token| {
        let product = u128::from(hash ^ u64::from(token)) * 0x9e37_79b9_7f4a_7c15;
        (product as u64) ^ ((product >> 64) as u64) ^ 0xa076_1d64_78bd_642f
    })
}

/// Passes a hash that is already spread through unchanged.
#[derive(Debug, Default, Clone)]
struct AsIs(u64);

impl Hasher for AsIs {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, _: &[u8]) {
        unreachable!("the index has u64 keys only");
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
}

/// End of the free list.
const NONE: BlockId = BlockId::MAX;

#[derive(Debug, Clone)]
struct Block {
    references: u32,
    /// What this block's content ends; `None` while it is not registered.
    registered: Option<Registration>,
    previous: BlockId,
    next: BlockId,
}

#[derive(Debug, Clone, Copy)]
struct Registration {
    hash: PrefixHash,
    parent: Chain,
    chain: Chain,
}

/// The pool.
#[derive(Debug)]
pub struct Blocks {
    block_tokens: usize,
    blocks: Vec<Block>,
    /// Tokens of registered blocks, `block_tokens` each.
    tokens: Vec<u32>,
    index: HashMap<PrefixHash, BlockId, BuildHasherDefault<AsIs>>,
    /// Taken first.
    oldest: BlockId,
    newest: BlockId,
    free: usize,
    chains: u64,
    caching: bool,
}

impl Blocks {
    /// A pool of `total` blocks of `block_tokens` tokens; `caching` turns prefix reuse on.
    ///
    /// # Panics
    /// When there are no blocks, blocks without tokens, or more blocks than ids.
    pub fn new(total: usize, block_tokens: usize, caching: bool) -> Self {
        assert!(total > 0 && block_tokens > 0 && total < NONE as usize);
        let blocks = vec![Block { references: 0, registered: None, previous: NONE, next: NONE }; total];
        let index = HashMap::with_capacity_and_hasher(if caching { total } else { 0 }, Default::default());
        let tokens = vec![0; if caching { total * block_tokens } else { 0 }];
        let mut pool = Self {
            block_tokens,
            blocks,
            tokens,
            index,
            oldest: NONE,
            newest: NONE,
            free: 0,
            chains: 0,
            caching,
        };
        // Lowest ids first: an idle engine then touches as little memory as it can.
        for id in (0..total).rev() {
            pool.link_oldest(id as BlockId);
        }
        pool
    }

    /// Tokens in a block.
    pub fn block_tokens(&self) -> usize {
        self.block_tokens
    }

    /// Blocks in all.
    pub fn total(&self) -> usize {
        self.blocks.len()
    }

    /// Whether prefixes are reused.
    pub fn caching(&self) -> bool {
        self.caching
    }

    /// Blocks that nobody holds, registered or not.
    pub fn free(&self) -> usize {
        self.free
    }

    /// Whether nobody holds the block.
    pub fn is_free(&self, id: BlockId) -> bool {
        self.blocks[id as usize].references == 0
    }

    /// Sequences that hold the block.
    pub fn references(&self, id: BlockId) -> u32 {
        self.blocks[id as usize].references
    }

    /// The registered block that continues `parent` by exactly `tokens`, and the chain that it ends.
    pub fn find(&self, hash: PrefixHash, parent: Chain, tokens: &[u32]) -> Option<(BlockId, Chain)> {
        let &id = self.index.get(&hash)?;
        let found = self.blocks[id as usize].registered.expect("blocks in the index are registered");
        (found.parent == parent && self.tokens_of(id) == tokens).then_some((id, found.chain))
    }

    /// Takes a block for new content; `None` when all are held. The least recently used one is forgotten.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let id = self.oldest;
        if id == NONE {
            return None;
        }
        self.unlink(id);
        let block = &mut self.blocks[id as usize];
        block.references = 1;
        if let Some(gone) = block.registered.take() {
            let removed = self.index.remove(&gone.hash);
            assert_eq!(removed, Some(id), "a registered block stands in the index");
        }
        Some(id)
    }

    /// One more sequence holds a block that [`Self::find`] gave.
    pub fn share(&mut self, id: BlockId) {
        let block = &self.blocks[id as usize];
        assert!(block.registered.is_some(), "only registered blocks are shared");
        if block.references == 0 {
            self.unlink(id);
        }
        self.blocks[id as usize].references += 1;
    }

    /// One sequence less holds the block. Callers release the last block of a table first, so that a
    /// prefix is forgotten from its end and never loses its beginning.
    pub fn release(&mut self, id: BlockId) {
        let block = &mut self.blocks[id as usize];
        assert!(block.references > 0, "block {id} is held");
        block.references -= 1;
        if block.references > 0 {
            return;
        }
        if block.registered.is_some() {
            self.link_newest(id);
        } else {
            self.link_oldest(id);
        }
    }

    /// Makes a full block known, after the step that filled it. Returns the chain that the block ends;
    /// `None` when it cannot be known (caching is off, or its hash is taken by other content).
    ///
    /// When another block already holds the same content, that one stays known and this one stays private.
    pub fn register(
        &mut self,
        id: BlockId,
        hash: PrefixHash,
        parent: Chain,
        tokens: &[u32],
    ) -> Option<Chain> {
        assert_eq!(tokens.len(), self.block_tokens, "only full blocks are registered");
        assert!(self.blocks[id as usize].references > 0, "only held blocks are registered");
        if !self.caching {
            return None;
        }
        if self.index.contains_key(&hash) {
            return self.find(hash, parent, tokens).map(|(_, chain)| chain);
        }
        self.chains += 1;
        let chain = Chain(self.chains);
        let start = id as usize * self.block_tokens;
        self.tokens[start..start + self.block_tokens].copy_from_slice(tokens);
        self.blocks[id as usize].registered = Some(Registration { hash, parent, chain });
        self.index.insert(hash, id);
        Some(chain)
    }

    fn tokens_of(&self, id: BlockId) -> &[u32] {
        let start = id as usize * self.block_tokens;
        &self.tokens[start..start + self.block_tokens]
    }

    fn link_newest(&mut self, id: BlockId) {
        let tail = self.newest;
        let block = &mut self.blocks[id as usize];
        (block.previous, block.next) = (tail, NONE);
        match tail {
            NONE => self.oldest = id,
            _ => self.blocks[tail as usize].next = id,
        }
        self.newest = id;
        self.free += 1;
    }

    fn link_oldest(&mut self, id: BlockId) {
        let head = self.oldest;
        let block = &mut self.blocks[id as usize];
        (block.previous, block.next) = (NONE, head);
        match head {
            NONE => self.newest = id,
            _ => self.blocks[head as usize].previous = id,
        }
        self.oldest = id;
        self.free += 1;
    }

    fn unlink(&mut self, id: BlockId) {
        let Block { previous, next, .. } = self.blocks[id as usize];
        match previous {
            NONE => self.oldest = next,
            _ => self.blocks[previous as usize].next = next,
        }
        match next {
            NONE => self.newest = previous,
            _ => self.blocks[next as usize].previous = previous,
        }
        self.free -= 1;
    }

    /// Checks the pool against itself. For tests: it walks everything.
    ///
    /// # Panics
    /// When an invariant does not hold.
    pub fn check(&self) {
        let mut listed = 0;
        let (mut id, mut previous) = (self.oldest, NONE);
        while id != NONE {
            let block = &self.blocks[id as usize];
            assert_eq!(block.references, 0, "listed blocks are held by nobody");
            assert_eq!(block.previous, previous);
            (previous, id) = (id, block.next);
            listed += 1;
            assert!(listed <= self.blocks.len(), "the free list has no cycle");
        }
        assert_eq!(listed, self.free);
        assert_eq!(listed, self.blocks.iter().filter(|block| block.references == 0).count());
        assert_eq!(self.index.len(), self.blocks.iter().filter(|b| b.registered.is_some()).count());
        for (hash, &id) in &self.index {
            let registered = self.blocks[id as usize].registered.expect("indexed blocks are registered");
            assert_eq!(registered.hash, *hash);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(total: usize) -> Blocks {
        Blocks::new(total, 2, true)
    }

    /// Takes a block, fills it and registers it behind `parent`.
    fn fill(pool: &mut Blocks, parent: (PrefixHash, Chain), tokens: &[u32]) -> (BlockId, PrefixHash, Chain) {
        let id = pool.allocate().expect("room");
        let hash = extend_hash(parent.0, tokens);
        let chain = pool.register(id, hash, parent.1, tokens).expect("a free hash");
        (id, hash, chain)
    }

    const ROOT: (PrefixHash, Chain) = (PREFIX_ROOT, Chain::ROOT);

    #[test]
    fn a_registered_block_is_found_by_tokens_and_parent_alone() {
        let mut pool = pool(4);
        let (a, hash, chain) = fill(&mut pool, ROOT, &[1, 2]);
        assert_eq!(pool.find(hash, Chain::ROOT, &[1, 2]), Some((a, chain)));
        assert_eq!(pool.find(hash, chain, &[1, 2]), None, "another parent");
        assert_eq!(pool.find(hash, Chain::ROOT, &[1, 3]), None, "other tokens under the same hash");
        pool.check();
    }

    #[test]
    fn a_hash_collision_is_never_registered_over() {
        let mut pool = pool(4);
        let (_, hash, _) = fill(&mut pool, ROOT, &[1, 2]);
        let other = pool.allocate().expect("room");
        assert_eq!(pool.register(other, hash, Chain::ROOT, &[7, 7]), None);
        assert_eq!(pool.find(hash, Chain::ROOT, &[7, 7]), None);
        pool.check();
    }

    #[test]
    fn equal_content_continues_the_known_chain() {
        let mut pool = pool(4);
        let (first, hash, chain) = fill(&mut pool, ROOT, &[1, 2]);
        let second = pool.allocate().expect("room");
        assert_eq!(pool.register(second, hash, Chain::ROOT, &[1, 2]), Some(chain));
        assert_eq!(pool.find(hash, Chain::ROOT, &[1, 2]).map(|found| found.0), Some(first));
        pool.release(second);
        assert_eq!(pool.allocate(), Some(second), "a block without known content is taken first");
        pool.check();
    }

    #[test]
    fn released_blocks_stay_known_until_taken_oldest_first() {
        let mut pool = pool(2);
        let (a, hash_a, chain_a) = fill(&mut pool, ROOT, &[1, 2]);
        let (b, hash_b, chain_b) = fill(&mut pool, (hash_a, chain_a), &[3, 4]);
        // A table is released from its end.
        pool.release(b);
        pool.release(a);
        assert_eq!(pool.free(), 2);
        assert_eq!(pool.find(hash_b, chain_a, &[3, 4]), Some((b, chain_b)));
        assert_eq!(pool.allocate(), Some(b), "the end of the prefix goes first");
        assert_eq!(pool.find(hash_b, chain_a, &[3, 4]), None);
        assert_eq!(pool.find(hash_a, Chain::ROOT, &[1, 2]), Some((a, chain_a)));
        pool.share(a);
        assert_eq!(pool.free(), 0);
        assert_eq!(pool.allocate(), None);
        pool.check();
    }

    #[test]
    fn shared_blocks_are_free_only_after_the_last_release() {
        let mut pool = pool(1);
        let (a, ..) = fill(&mut pool, ROOT, &[1, 2]);
        pool.share(a);
        pool.release(a);
        assert_eq!((pool.free(), pool.references(a)), (0, 1));
        pool.release(a);
        assert_eq!(pool.free(), 1);
        pool.check();
    }

    #[test]
    fn without_caching_nothing_is_known() {
        let mut pool = Blocks::new(2, 2, false);
        let id = pool.allocate().expect("room");
        let hash = extend_hash(PREFIX_ROOT, &[1, 2]);
        assert_eq!(pool.register(id, hash, Chain::ROOT, &[1, 2]), None);
        assert_eq!(pool.find(hash, Chain::ROOT, &[1, 2]), None);
    }
}
