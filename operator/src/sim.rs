//! The simulation that judges the autoscaler.
