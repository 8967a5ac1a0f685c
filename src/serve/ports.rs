//! Starting DPDK and the ports of the configuration.

use std::sync::Arc;

use crate::config::{Config, Device, Port as PortSettings};
use crate::eal::{BURST, EalArgs, Environment, HEADROOM, Mempool, Port, PortConfig};
use crate::fallback::udp::UdpSocket;
use crate::net::rx::RxPort;
use crate::net::{Demux, Interface, InterfaceConfig, NetCounters, Responder};
use crate::topology::{Machine, Plan};

use super::Error;
use crate::shard::INBOUND_SLOTS;

/// Mbufs that an lcore's mempool cache may hold back: 1.5 times its size, twice for safety.
const CACHE_SHARE: u32 = 768;
/// Bytes of a frame beside its IP packet: Ethernet header, two VLAN tags, FCS.
const FRAME_OVERHEAD: u16 = 14 + 8 + 4;
/// Smallest buffer behind the headroom: what drivers take as one full-sized frame.
const MIN_BUFFER: u16 = 2048;
/// Bytes of an mbuf beside its data room.
const MBUF_OVERHEAD: u64 = 256;
/// EAL's own needs, and slack for the alignment of pools.
const EAL_BASE: u64 = 48 << 20;
/// Packet slots of an AF_PACKET ring: 8,192 frames ride out 10 ms at 800,000 packets/s, about what
/// the kernel's stack delivers.
const AF_PACKET_FRAMES: u32 = 8192;
/// Drivers whose peer may be this machine's kernel, which leaves UDP checksums unfinished on them.
const PARTIAL_CHECKSUM_DRIVERS: [&str; 3] = ["net_af_packet", "net_af_xdp", "net_tap"];

/// A port for the statistics.
pub(super) struct PortView {
    pub name: String,
    pub source: Source,
    /// One for each rx lcore that polls the port, or of the thread of kernel UDP.
    pub counters: Vec<Arc<NetCounters>>,
}

/// Where a port's packets come from.
pub(super) enum Source {
    Dpdk {
        port: Port,
        /// The kernel interface below an AF_PACKET port, and its packet count before the start.
        interface: Option<(String, u64)>,
    },
    Kernel(Vec<Arc<UdpSocket>>),
}

/// Started ports.
pub(super) struct Started {
    /// By rx lcore, in the order of the plan.
    pub rx_ports: Vec<Vec<RxPort>>,
    /// With their places among all ports of the configuration.
    pub ports: Vec<(usize, PortView)>,
}

/// How EAL gets at a port's device.
enum Access {
    Pci(String),
    Vdev(String),
    /// Found among the PCI devices that are bound already.
    Mac([u8; 6]),
}

/// A kernel interface is taken over its PCI device where DPDK's driver works beside the kernel's, else
/// through AF_PACKET.
fn access(settings: &PortSettings) -> Result<Access, Error> {
    Ok(match &settings.device {
        Device::Pci(address) => Access::Pci(address.clone()),
        Device::Vdev(text) => Access::Vdev(text.clone()),
        Device::Mac(mac) => Access::Mac(*mac),
        Device::Kernel => {
            return Err(format!(
                "port {}: kernel sockets are no device of DPDK",
                settings.name
            )
            .into());
        }
        Device::Interface(name) => {
            let folder = format!("/sys/class/net/{name}");
            if !std::path::Path::new(&folder).exists() {
                return Err(format!(
                    "port {}: there is no interface {name} (ip link shows them)",
                    settings.name
                )
                .into());
            }
            let last = |link: &str| {
                let target = std::fs::read_link(format!("{folder}/{link}")).ok()?;
                Some(target.file_name()?.to_str()?.to_owned())
            };
            match (last("device/driver"), last("device")) {
                (Some(driver), Some(address)) if driver.starts_with("mlx") => Access::Pci(address),
                _ => Access::Vdev(format!(
                    "net_af_packet_{},iface={name},qpairs={},blocksz=16384,framesz=2048,framecnt={AF_PACKET_FRAMES}",
                    settings.name, settings.queues
                )),
            }
        }
    })
}

/// Bytes of an mbuf of this port, headroom included.
fn data_room(settings: &PortSettings) -> u16 {
    HEADROOM as u16
        + (settings.mtu + FRAME_OVERHEAD)
            .next_multiple_of(64)
            .max(MIN_BUFFER)
}

/// Mbufs that the port's receivers, its answers and the messages on their way to the shards hold.
fn mbufs(settings: &PortSettings, lcores: u32, shards: u32) -> u32 {
    let queues = u32::from(settings.queues) + lcores;
    let count = queues * u32::from(settings.descriptors)
        + lcores * (shards * INBOUND_SLOTS as u32 + CACHE_SHARE + 2 * BURST as u32)
        + shards * CACHE_SHARE;
    // DPDK's rings waste least with a power of two less one.
    count.next_power_of_two() - 1
}

/// The lcores that poll a port, by their place in the plan.
fn pollers(plan: &Plan, port: usize) -> Vec<usize> {
    let polls = |&i: &usize| plan.lcores[i].queues.iter().any(|&(p, _)| p == port);
    (0..plan.lcores.len()).filter(polls).collect()
}

/// Bytes that EAL takes for the ports' packet buffers and descriptors; 0: there are no ports of its own.
pub(super) fn memory(config: &Config, plan: &Plan) -> u64 {
    if config.dpdk_ports().next().is_none() {
        return 0;
    }
    let shards = u32::from(config.storage.shards);
    let pool = |(index, port): (usize, &PortSettings)| {
        let count = mbufs(port, pollers(plan, index).len() as u32, shards);
        u64::from(count + 1) * (u64::from(data_room(port)) + MBUF_OVERHEAD)
    };
    let pools: u64 = config.dpdk_ports().map(pool).sum();
    let memory = EAL_BASE + pools * 9 / 8;
    config
        .eal
        .memory
        .unwrap_or(memory.next_multiple_of(2 << 20))
}

/// Starts EAL and every port of its own; where there is none, neither. The calling thread becomes EAL's main lcore.
pub(super) fn start(config: &Config, plan: &Plan) -> Result<(Option<Environment>, Started), Error> {
    if config.dpdk_ports().next().is_none() {
        let started = Started {
            rx_ports: Vec::new(),
            ports: Vec::new(),
        };
        return Ok((None, started));
    }
    let accesses = config.dpdk_ports().map(|(_, port)| access(port));
    let accesses: Vec<Access> = accesses.collect::<Result<_, _>>()?;
    let machine_cpus: Vec<u32> = Machine::discover()?.cpus.iter().map(|cpu| cpu.id).collect();
    let workers: Vec<u32> = plan.lcores.iter().map(|lcore| lcore.cpu).collect();
    let rx_lcores: Vec<usize> = (0..plan.lcores.len())
        .filter(|&i| !plan.lcores[i].queues.is_empty())
        .collect();
    let shards = u32::from(config.storage.shards);
    let lcores_of = |port: usize| pollers(plan, port);
    let memory = memory(config, plan);

    let pci: Vec<String> = accesses
        .iter()
        .filter_map(|a| {
            if let Access::Pci(a) = a {
                Some(a.clone())
            } else {
                None
            }
        })
        .collect();
    let mut arguments = EalArgs::new(&config.eal.file_prefix, &machine_cpus, &workers)
        .memory(memory >> 20, config.eal.hugepages);
    if accesses.iter().all(|a| !matches!(a, Access::Mac(_))) {
        arguments = arguments.pci(&pci);
    }
    for access in &accesses {
        if let Access::Vdev(text) = access {
            arguments = arguments.vdev(text);
        }
    }
    let environment = Environment::start(&arguments.extra(&config.eal.extra_args))?;

    let mut rx_ports: Vec<Vec<RxPort>> = rx_lcores.iter().map(|_| Vec::new()).collect();
    let mut views = Vec::new();
    for ((index, settings), access) in config.dpdk_ports().zip(&accesses) {
        let port = match access {
            Access::Pci(name) | Access::Vdev(name) => Port::by_name(&environment, name)?,
            Access::Mac(mac) => Port::by_mac(&environment, *mac)?,
        };
        let users = lcores_of(index);
        let pool = Mempool::new(
            &environment,
            &format!("mbufs_{index}"),
            mbufs(settings, users.len() as u32, shards),
            data_room(settings),
            port.node(),
        )?;
        let interface_name = iface(access);
        let before = interface_name.as_deref().map_or(0, received_by_kernel);
        let (rx, tx) = port.start(
            &PortConfig {
                rx_queues: settings.queues,
                tx_queues: users.len().max(1) as u16,
                descriptors: settings.descriptors,
                mtu: settings.mtu,
                promiscuous: settings.promiscuous,
                // Neighbour discovery and multicast groups; which groups are ours is told in software.
                all_multicast: true,
            },
            &vec![pool.clone(); usize::from(settings.queues)],
        )?;
        let mac = port.mac();
        tracing::info!(
            "port {}: {} ({}), MAC {}, link {}",
            settings.name,
            port.device(),
            port.driver(),
            mac.map(|b| format!("{b:02x}")).join(":"),
            port.link()
        );
        let demux = Demux::new(&super::listeners(config, index))?;
        let interface = Interface::new(&InterfaceConfig {
            mac,
            addresses: settings
                .addresses
                .iter()
                .map(|a| (a.address, a.prefix))
                .collect(),
            groups: settings.multicast.clone(),
            vlan: settings.vlan,
            mtu: settings.mtu,
            promiscuous: settings.promiscuous,
        });
        let mut rx: Vec<_> = rx.into_iter().map(Some).collect();
        let mut counters = Vec::new();
        for ((place, &lcore), tx) in users.iter().enumerate().zip(tx) {
            let all = plan.lcores[lcore].queues.iter();
            let queues = all.filter(|&&(p, _)| p == index).map(|&(_, q)| q);
            let own = Arc::new(NetCounters::new(queues.clone()));
            counters.push(Arc::clone(&own));
            let port_of_lcore = RxPort {
                rx: queues.filter_map(|q| rx[usize::from(q)].take()).collect(),
                tx,
                pool: pool.clone(),
                responder: Responder::new(interface.clone()),
                demux: demux.clone(),
                counters: own,
                partial_checksums: PARTIAL_CHECKSUM_DRIVERS.contains(&port.driver()),
                announces: place == 0,
            };
            if let Some(worker) = rx_lcores.iter().position(|&i| i == lcore) {
                rx_ports[worker].push(port_of_lcore);
            }
        }
        let view = PortView {
            name: settings.name.clone(),
            source: Source::Dpdk {
                port,
                interface: interface_name.map(|name| (name, before)),
            },
            counters,
        };
        views.push((index, view));
    }
    Ok((
        Some(environment),
        Started {
            rx_ports,
            ports: views,
        },
    ))
}

/// The kernel interface below an AF_PACKET device.
fn iface(access: &Access) -> Option<String> {
    let Access::Vdev(text) = access else {
        return None;
    };
    let name = text
        .strip_prefix("net_af_packet")?
        .split(',')
        .find_map(|part| part.strip_prefix("iface="))?;
    Some(name.to_owned())
}

/// Packets that the kernel delivered to an interface.
pub(super) fn received_by_kernel(interface: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/sys/class/net/{interface}/statistics/rx_packets"));
    text.ok().and_then(|t| t.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn port(keys: &str) -> PortSettings {
        let text = format!("[storage]\npath = \"/d\"\n[[port]]\nname = \"a\"\n{keys}\n");
        Config::parse(&text, Path::new("t"))
            .unwrap()
            .ports
            .remove(0)
    }

    #[test]
    fn buffers_hold_the_largest_frame() {
        assert_eq!(
            usize::from(data_room(&port("device = \"net_null0\""))),
            HEADROOM + 2048
        );
        let jumbo = data_room(&port("device = \"net_null0\"\nmtu = 9000"));
        assert!(usize::from(jumbo) >= HEADROOM + 9000 + 26);
    }

    #[test]
    fn pools_cover_descriptors_and_rings() {
        let port = port("device = \"net_null0\"\nqueues = 4");
        assert!(mbufs(&port, 1, 1) > 5 * 1024 + INBOUND_SLOTS as u32);
        assert_eq!((mbufs(&port, 2, 2) + 1).count_ones(), 1);
    }

    #[test]
    fn interfaces_are_taken_through_af_packet() {
        let Ok(Access::Vdev(text)) = access(&port("device = \"lo\"")) else {
            panic!("lo is no PCI device")
        };
        assert!(text.starts_with("net_af_packet_a,iface=lo,"), "{text}");
        assert_eq!(iface(&Access::Vdev(text)).as_deref(), Some("lo"));
        let Err(error) = access(&port("device = \"nosuch0\"")) else {
            panic!("there is no nosuch0")
        };
        assert!(error.to_string().contains("no interface nosuch0"));
    }
}
