//! Ethernet ports: found by name or MAC, configured as far as the device can, and taken apart into
//! queue handles that each belong to one thread.

use std::ffi::{CStr, c_char};
use std::sync::Arc;

use super::environment::{Environment, words};
use super::mbuf::{BURST, RxBurst, TxBurst};
use super::mempool::Mempool;

/// An error of a port, with the port's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PortError {
    /// No such device among DPDK's ports.
    #[error("port {device} is unknown to DPDK{hint}; its ports are: {known}")]
    Unknown {
        /// What was asked for.
        device: String,
        /// What may have gone wrong.
        hint: String,
        /// The ports that there are.
        known: String,
    },
    /// More queues than the device has.
    #[error(
        "port {device} ({driver}) has {have} {direction} queues, {wanted} are asked for: lower `queues`"
    )]
    Queues {
        /// The port.
        device: String,
        /// Its driver.
        driver: String,
        /// Queues it has.
        have: u16,
        /// Queues asked for.
        wanted: u16,
        /// `receive` or `transmit`.
        direction: &'static str,
    },
    /// A larger MTU than the device can.
    #[error(
        "port {device} ({driver}) can carry an MTU from {least} to {most}, {wanted} is asked for: change `mtu`"
    )]
    Mtu {
        /// The port.
        device: String,
        /// Its driver.
        driver: String,
        /// Least MTU.
        least: u16,
        /// Largest MTU.
        most: u16,
        /// MTU asked for.
        wanted: u16,
    },
    /// A call failed.
    #[error("port {device}: {what}: {reason}")]
    Call {
        /// The port.
        device: String,
        /// What was tried.
        what: &'static str,
        /// Why it failed, in words.
        reason: String,
    },
}

/// How a port is to be set up.
#[derive(Debug, Clone)]
pub struct PortConfig {
    /// Receive queues; as many transmit queues are made, but no more than `tx_queues`.
    pub rx_queues: u16,
    /// Transmit queues.
    pub tx_queues: u16,
    /// Descriptors of each queue.
    pub descriptors: u16,
    /// Largest IP packet in bytes.
    pub mtu: u16,
    /// Receive frames for other MAC addresses.
    pub promiscuous: bool,
    /// Receive all multicast frames; groups are then told apart in software.
    pub all_multicast: bool,
}

/// State of the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// Whether it is up.
    pub up: bool,
    /// Mbit/s; `None` where the device does not know.
    pub speed: Option<u32>,
}

impl std::fmt::Display for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.up, self.speed) {
            (false, _) => f.write_str("down"),
            (true, None) => f.write_str("up"),
            (true, Some(speed)) if speed % 1000 == 0 => write!(f, "up {} Gbit/s", speed / 1000),
            (true, Some(speed)) => write!(f, "up {speed} Mbit/s"),
        }
    }
}

/// The device's own counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PortStats {
    /// Packets received.
    pub rx_packets: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Packets that found no descriptor: the receiver was too slow.
    pub rx_missed: u64,
    /// Damaged packets.
    pub rx_errors: u64,
    /// Packets that found no mbuf.
    pub rx_no_mbuf: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Packets that could not be sent.
    pub tx_errors: u64,
}

/// A port. It is stopped when it and all its queues are gone.
#[derive(Debug)]
pub struct Port {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    id: u16,
    device: String,
    driver: String,
    configured: std::sync::atomic::AtomicBool,
    pools: std::sync::Mutex<Vec<Mempool>>,
    _environment: Environment,
}

/// A receive queue; one thread polls it.
#[derive(Debug)]
pub struct RxQueue {
    port: Arc<Inner>,
    queue: u16,
    /// Keeps the handle from being shared between threads.
    _not_sync: std::marker::PhantomData<std::cell::Cell<()>>,
}

/// A transmit queue; one thread fills it.
#[derive(Debug)]
pub struct TxQueue {
    port: Arc<Inner>,
    queue: u16,
    _not_sync: std::marker::PhantomData<std::cell::Cell<()>>,
}

/// DPDK's structures are plain data; all zeros is their documented default.
fn zeroed<T: Copy>() -> T {
    // SAFETY: only used for bindgen's structures of integers, bit fields and nullable pointers.
    unsafe { std::mem::zeroed() }
}

fn all_ports() -> Vec<(u16, String)> {
    let mut ports = Vec::new();
    let mut id = 0u16;
    loop {
        // SAFETY: plain numbers.
        let found = unsafe { dpdk_sys::rte_eth_find_next(id) };
        if u32::from(found) >= dpdk_sys::RTE_MAX_ETHPORTS {
            break;
        }
        let mut name = [0 as c_char; dpdk_sys::RTE_ETH_NAME_MAX_LEN as usize];
        // SAFETY: the buffer has the length that the call asks for.
        if unsafe { dpdk_sys::rte_eth_dev_get_name_by_port(found, name.as_mut_ptr()) } == 0 {
            // SAFETY: the call wrote a NUL-terminated name.
            let text = unsafe { CStr::from_ptr(name.as_ptr()) };
            ports.push((found, text.to_string_lossy().into_owned()));
        }
        id = found + 1;
    }
    ports
}

impl Port {
    /// Finds a port by DPDK's name: the PCI address, or the first word of the vdev string.
    pub fn by_name(environment: &Environment, device: &str) -> Result<Self, PortError> {
        let name = device.split(',').next().unwrap_or(device);
        let ports = all_ports();
        match ports.iter().find(|(_, known)| known == name) {
            Some((id, _)) => Ok(Self::new(environment, *id, name)),
            None => Err(unknown(device, &ports)),
        }
    }

    /// Finds a port by its MAC address.
    pub fn by_mac(environment: &Environment, mac: [u8; 6]) -> Result<Self, PortError> {
        let ports = all_ports();
        let text = mac.map(|b| format!("{b:02x}")).join(":");
        for (id, name) in &ports {
            let port = Self::new(environment, *id, name);
            if port.mac() == mac {
                return Ok(port);
            }
        }
        Err(unknown(&text, &ports))
    }

    fn new(environment: &Environment, id: u16, device: &str) -> Self {
        let info = info(id);
        let driver = if info.driver_name.is_null() {
            "unknown driver".to_owned()
        } else {
            // SAFETY: drivers give a static NUL-terminated name.
            unsafe { CStr::from_ptr(info.driver_name) }
                .to_string_lossy()
                .into_owned()
        };
        Self {
            inner: Arc::new(Inner {
                id,
                device: device.to_owned(),
                driver,
                configured: false.into(),
                pools: std::sync::Mutex::default(),
                _environment: environment.clone(),
            }),
        }
    }

    /// DPDK's name of the device.
    pub fn device(&self) -> &str {
        &self.inner.device
    }

    /// The driver's name.
    pub fn driver(&self) -> &str {
        &self.inner.driver
    }

    /// The NUMA node; `None` where it is unknown.
    pub fn node(&self) -> Option<u32> {
        // SAFETY: plain numbers.
        let node = unsafe { dpdk_sys::rte_eth_dev_socket_id(self.inner.id) };
        u32::try_from(node).ok()
    }

    /// The MAC address.
    pub fn mac(&self) -> [u8; 6] {
        let mut mac: dpdk_sys::rte_ether_addr = zeroed();
        // SAFETY: the structure is written by the call.
        unsafe { dpdk_sys::rte_eth_macaddr_get(self.inner.id, &mut mac) };
        mac.addr_bytes
    }

    /// Receive queues that the device offers.
    pub fn max_rx_queues(&self) -> u16 {
        info(self.inner.id).max_rx_queues
    }

    /// Configures and starts the port; receive queue `i` takes its mbufs from `pools[i]`.
    ///
    /// Checksum offloads and RSS are asked for as far as the device has them.
    ///
    /// # Panics
    /// When there are fewer pools than receive queues.
    pub fn start(
        &self,
        config: &PortConfig,
        pools: &[Mempool],
    ) -> Result<(Vec<RxQueue>, Vec<TxQueue>), PortError> {
        assert!(
            pools.len() >= usize::from(config.rx_queues),
            "one pool a receive queue"
        );
        let id = self.inner.id;
        let info = info(id);
        for (have, wanted, direction) in [
            (info.max_rx_queues, config.rx_queues, "receive"),
            (info.max_tx_queues, config.tx_queues, "transmit"),
        ] {
            if wanted > have {
                return Err(PortError::Queues {
                    device: self.inner.device.clone(),
                    driver: self.inner.driver.clone(),
                    have,
                    wanted,
                    direction,
                });
            }
        }
        if config.mtu != DEFAULT_MTU && !(info.min_mtu..=info.max_mtu).contains(&config.mtu) {
            return Err(PortError::Mtu {
                device: self.inner.device.clone(),
                driver: self.inner.driver.clone(),
                least: info.min_mtu,
                most: info.max_mtu,
                wanted: config.mtu,
            });
        }

        let mut conf: dpdk_sys::rte_eth_conf = zeroed();
        let checksums =
            dpdk_sys::RTE_ETH_RX_OFFLOAD_IPV4_CKSUM | dpdk_sys::RTE_ETH_RX_OFFLOAD_UDP_CKSUM;
        conf.rxmode.offloads = checksums & info.rx_offload_capa;
        conf.rxmode.mtu = u32::from(config.mtu.min(info.max_mtu));
        if config.rx_queues > 1 {
            let flows = dpdk_sys::RTE_ETH_RSS_IP | dpdk_sys::RTE_ETH_RSS_UDP;
            conf.rx_adv_conf.rss_conf.rss_hf = flows & info.flow_type_rss_offloads;
            conf.rxmode.mq_mode = dpdk_sys::rte_eth_rx_mq_mode_RTE_ETH_MQ_RX_RSS;
        }
        // SAFETY: the structure is read by the call.
        self.call("configure", unsafe {
            dpdk_sys::rte_eth_dev_configure(id, config.rx_queues, config.tx_queues, &conf)
        })?;
        self.inner
            .configured
            .store(true, std::sync::atomic::Ordering::Relaxed);

        let (mut rx_desc, mut tx_desc) = (config.descriptors, config.descriptors);
        // SAFETY: both numbers are written by the call.
        self.call("adjust descriptors", unsafe {
            dpdk_sys::rte_eth_dev_adjust_nb_rx_tx_desc(id, &mut rx_desc, &mut tx_desc)
        })?;
        // Before the first queue takes mbufs: a later step may fail, and the port's close still gives
        // them back.
        self.inner
            .pools
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .extend_from_slice(pools);
        let node = self.node().unwrap_or(0);
        let mut rx = Vec::with_capacity(usize::from(config.rx_queues));
        for (queue, pool) in (0..config.rx_queues).zip(pools) {
            // SAFETY: the pool lives as long as the port, which keeps a clone; no queue
            // configuration is the driver's default.
            let code = unsafe {
                dpdk_sys::rte_eth_rx_queue_setup(
                    id,
                    queue,
                    rx_desc,
                    node,
                    std::ptr::null(),
                    pool.as_ptr(),
                )
            };
            self.call("set up a receive queue", code)?;
            rx.push(RxQueue {
                port: Arc::clone(&self.inner),
                queue,
                _not_sync: std::marker::PhantomData,
            });
        }
        let mut tx = Vec::with_capacity(usize::from(config.tx_queues));
        for queue in 0..config.tx_queues {
            // SAFETY: no queue configuration is the driver's default.
            let code = unsafe {
                dpdk_sys::rte_eth_tx_queue_setup(id, queue, tx_desc, node, std::ptr::null())
            };
            self.call("set up a transmit queue", code)?;
            tx.push(TxQueue {
                port: Arc::clone(&self.inner),
                queue,
                _not_sync: std::marker::PhantomData,
            });
        }
        // SAFETY: plain numbers.
        self.call("start", unsafe { dpdk_sys::rte_eth_dev_start(id) })?;
        if config.promiscuous {
            // SAFETY: plain numbers.
            self.call_if_supported("promiscuous mode", unsafe {
                dpdk_sys::rte_eth_promiscuous_enable(id)
            })?;
        }
        if config.all_multicast {
            // SAFETY: plain numbers.
            self.call_if_supported("receive multicast", unsafe {
                dpdk_sys::rte_eth_allmulticast_enable(id)
            })?;
        }
        Ok((rx, tx))
    }

    /// A second handle, for statistics.
    #[must_use]
    pub fn share(&self) -> Self {
        Self {
            inner: Arc::clone(&self.inner),
        }
    }

    /// The link's state; does not wait.
    pub fn link(&self) -> Link {
        let mut link: dpdk_sys::rte_eth_link = zeroed();
        // SAFETY: the structure is written by the call.
        if unsafe { dpdk_sys::rte_eth_link_get_nowait(self.inner.id, &mut link) } != 0 {
            return Link {
                up: false,
                speed: None,
            };
        }
        let known = link.link_speed != 0 && link.link_speed != u32::MAX;
        Link {
            up: link.link_status() != 0,
            speed: known.then_some(link.link_speed),
        }
    }

    /// The device's counts since its start.
    pub fn stats(&self) -> PortStats {
        let mut stats: dpdk_sys::rte_eth_stats = zeroed();
        // SAFETY: the structure is written by the call.
        if unsafe { dpdk_sys::rte_eth_stats_get(self.inner.id, &mut stats) } != 0 {
            return PortStats::default();
        }
        PortStats {
            rx_packets: stats.ipackets,
            rx_bytes: stats.ibytes,
            rx_missed: stats.imissed,
            rx_errors: stats.ierrors,
            rx_no_mbuf: stats.rx_nombuf,
            tx_packets: stats.opackets,
            tx_bytes: stats.obytes,
            tx_errors: stats.oerrors,
        }
    }

    /// The driver's extended counts by name.
    pub fn extended_stats(&self) -> Vec<(String, u64)> {
        // SAFETY: with no array the call returns the number of counts.
        let count = unsafe { dpdk_sys::rte_eth_xstats_get(self.inner.id, std::ptr::null_mut(), 0) };
        let count = usize::try_from(count).unwrap_or(0);
        let mut values = vec![zeroed::<dpdk_sys::rte_eth_xstat>(); count];
        let mut names = vec![zeroed::<dpdk_sys::rte_eth_xstat_name>(); count];
        // SAFETY: the arrays have the length given.
        let (got, named) = unsafe {
            (
                dpdk_sys::rte_eth_xstats_get(self.inner.id, values.as_mut_ptr(), count as u32),
                dpdk_sys::rte_eth_xstats_get_names(self.inner.id, names.as_mut_ptr(), count as u32),
            )
        };
        let valid = usize::try_from(got.min(named)).unwrap_or(0).min(count);
        values[..valid]
            .iter()
            .filter_map(|stat| {
                let name = names.get(stat.id as usize)?;
                // SAFETY: DPDK writes a NUL-terminated name.
                let text = unsafe { CStr::from_ptr(name.name.as_ptr()) };
                Some((text.to_string_lossy().into_owned(), stat.value))
            })
            .collect()
    }

    fn call(&self, what: &'static str, code: i32) -> Result<(), PortError> {
        if code >= 0 {
            return Ok(());
        }
        Err(PortError::Call {
            device: self.inner.device.clone(),
            what,
            reason: words(code),
        })
    }

    /// As `call`, but a device that has no such notion (virtual ones) is fine.
    fn call_if_supported(&self, what: &'static str, code: i32) -> Result<(), PortError> {
        if code == -libc::ENOTSUP {
            Ok(())
        } else {
            self.call(what, code)
        }
    }
}

/// Every Ethernet device carries it.
const DEFAULT_MTU: u16 = 1500;

fn info(id: u16) -> dpdk_sys::rte_eth_dev_info {
    let mut info: dpdk_sys::rte_eth_dev_info = zeroed();
    // SAFETY: the structure is written by the call.
    unsafe { dpdk_sys::rte_eth_dev_info_get(id, &mut info) };
    info
}

/// Kernel drivers that DPDK works beside: their NICs are never bound to vfio.
const BIFURCATED: [&str; 3] = ["mlx4_core", "mlx5_core", "mana"];

/// Why DPDK does not know the PCI device at `folder` (of sysfs), and what to do.
fn pci_hint(folder: &std::path::Path, device: &str) -> String {
    if !folder.exists() {
        return ": there is no such PCI device (lspci -D shows them)".to_owned();
    }
    let driver = std::fs::read_link(folder.join("driver"))
        .ok()
        .and_then(|link| Some(link.file_name()?.to_string_lossy().into_owned()));
    match driver.as_deref() {
        None => {
            format!(" and bound to no driver: run scripts/bind-nics.sh bind {device}")
        }
        Some(name) if BIFURCATED.contains(&name) => format!(
            " though {name} stays bound: install DPDK's driver with its libraries (apt-get install dpdk ibverbs-providers)"
        ),
        Some(name) if name.starts_with("vfio") => format!(
            " though bound to {name}: DPDK has no driver for it, or may not open /dev/vfio (run as root)"
        ),
        Some(name) => {
            format!(" and bound to {name}: run scripts/bind-nics.sh bind {device}")
        }
    }
}

/// Whether this reads as a PCI address with its domain (`0000:3b:00.0`).
fn is_pci_address(device: &str) -> bool {
    let b = device.as_bytes();
    b.len() == 12
        && b.iter().enumerate().all(|(i, c)| match i {
            4 | 7 => *c == b':',
            10 => *c == b'.',
            _ => c.is_ascii_hexdigit(),
        })
}

fn unknown(device: &str, ports: &[(u16, String)]) -> PortError {
    let hint = if is_pci_address(device) {
        let folder = std::path::Path::new("/sys/bus/pci/devices").join(device);
        pci_hint(&folder, device)
    } else if device.starts_with("net_") {
        ": is its driver installed (apt-get install dpdk), and does it take these arguments?"
            .to_owned()
    } else {
        String::new()
    };
    let known: Vec<&str> = ports.iter().map(|(_, name)| name.as_str()).collect();
    let known = if known.is_empty() {
        "none".to_owned()
    } else {
        known.join(", ")
    };
    PortError::Unknown {
        device: device.to_owned(),
        hint,
        known,
    }
}

impl RxQueue {
    /// Receives up to [`BURST`] packets into `burst`, which must be empty; returns their number.
    #[inline(always)]
    pub fn receive(&self, burst: &mut RxBurst) -> usize {
        debug_assert!(burst.is_empty());
        // SAFETY: the port is started, the array has room for BURST mbufs, and this handle is the only
        // one of its queue and not shared.
        let count = unsafe {
            dpdk_sys::tf_rx_burst(
                self.port.id,
                self.queue,
                burst.mbufs.as_mut_ptr(),
                BURST as u16,
            )
        };
        burst.len = usize::from(count);
        burst.len
    }
}

impl TxQueue {
    /// Sends the burst; packets that the queue does not take are freed. Returns how many it took.
    #[inline]
    pub fn send(&self, burst: &mut TxBurst) -> usize {
        // SAFETY: the first `len` entries are mbufs of the burst; the driver owns those it takes.
        let sent = unsafe {
            dpdk_sys::tf_tx_burst(
                self.port.id,
                self.queue,
                burst.mbufs.as_mut_ptr(),
                burst.len as u16,
            )
        };
        let sent = usize::from(sent);
        if sent < burst.len {
            // SAFETY: the entries behind `sent` are still the burst's.
            unsafe {
                dpdk_sys::tf_mbuf_free_bulk(
                    burst.mbufs.as_mut_ptr().add(sent),
                    (burst.len - sent) as u32,
                );
            }
        }
        burst.len = 0;
        sent
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if !*self.configured.get_mut() {
            return;
        }
        // SAFETY: all queue handles are gone.
        unsafe {
            dpdk_sys::rte_eth_dev_stop(self.id);
            dpdk_sys::rte_eth_dev_close(self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pci_device_unknown_to_dpdk_is_explained() {
        let device = "0000:3b:00.0";
        assert!(is_pci_address(device));
        for other in ["net_memif0", "3b:00.0", "0000:3b:00-0", "02:70:63:61:70:00"] {
            assert!(!is_pci_address(other), "{other}");
        }
        let bus = tempfile::tempdir().unwrap();
        let folder = bus.path().join(device);
        assert!(pci_hint(&folder, device).contains("no such PCI device"));
        std::fs::create_dir(&folder).unwrap();
        assert!(pci_hint(&folder, device).contains("bound to no driver"));
        for (driver, words) in [
            (
                "ixgbe",
                " and bound to ixgbe: run scripts/bind-nics.sh bind 0000:3b:00.0",
            ),
            ("mlx5_core", "ibverbs-providers"),
            ("vfio-pci", "/dev/vfio"),
        ] {
            std::os::unix::fs::symlink(bus.path().join(driver), folder.join("driver")).unwrap();
            let hint = pci_hint(&folder, device);
            assert!(hint.contains(words), "{hint}");
            assert_eq!(hint.contains("bind-nics"), driver == "ixgbe", "{hint}");
            std::fs::remove_file(folder.join("driver")).unwrap();
        }
    }
}
