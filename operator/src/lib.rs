//! The operator of Millrace.
//!
//! [`scale`] is the autoscaler: a pure function from what was read to how many workers there should be, and
//! why. [`sim`] replays traffic through that very function in virtual time, beside other autoscalers' rules
//! and the optimum of one that knows the future.

pub mod scale;
pub mod sim;
