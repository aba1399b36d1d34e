//! Pod addresses. All processes of the machine share one loopback interface, so that each pod gets an address
//! of its own in 127.0.0.0/8: two pods may then listen on the same port.
//!
//! A block of 254 addresses belongs to one reserved port, which no other harness on the machine holds.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};

use crate::ports::Port;

/// A block of addresses.
#[derive(Debug, Clone)]
pub struct Addresses {
    block: Arc<Port>,
    used: Arc<Mutex<BTreeSet<u8>>>,
}

/// A pod's address. Dropping it gives it back.
#[derive(Debug)]
pub struct Address {
    addresses: Addresses,
    last: u8,
}

impl Addresses {
    /// Reserves a block.
    ///
    /// # Errors
    /// When no block is free.
    pub fn reserve() -> Result<Self> {
        Ok(Self { block: Arc::new(Port::reserve()?), used: Arc::default() })
    }

    /// Takes a free address.
    ///
    /// # Errors
    /// When all 254 are taken.
    pub fn take(&self) -> Result<Address> {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let last = (1..255).find(|last| !used.contains(last)).context("254 pods have all addresses")?;
        used.insert(last);
        Ok(Address { addresses: self.clone(), last })
    }
}

impl Address {
    /// The address.
    pub fn ip(&self) -> Ipv4Addr {
        // Ports lie above 20000, and so the blocks above 127.78.0.0, far from what anything else uses.
        let [high, low] = self.addresses.block.number().to_be_bytes();
        Ipv4Addr::new(127, high, low, self.last)
    }
}

impl Drop for Address {
    fn drop(&mut self) {
        self.addresses.used.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.last);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_loopback_unique_and_reused() {
        let (one, two) = (Addresses::reserve().unwrap(), Addresses::reserve().unwrap());
        let taken: Vec<Address> = (0..254).map(|_| one.take().unwrap()).collect();
        assert!(one.take().is_err());
        let ips: BTreeSet<Ipv4Addr> = taken.iter().map(Address::ip).collect();
        assert_eq!(ips.len(), 254);
        assert!(ips.iter().all(Ipv4Addr::is_loopback) && !ips.contains(&two.take().unwrap().ip()));
        drop(taken);
        assert!(one.take().is_ok());
    }
}
