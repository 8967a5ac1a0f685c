//! Which CPU, NIC queue and shard go together.
//!
//! [`Machine`] is what hwloc says of the machine, [`plan`] a pure function from it and the
//! configuration to the lcores. Invariants of a [`Plan`]: every queue of every port and every shard is
//! served by exactly one lcore; in the spread layout no two lcores share a CPU. A NIC whose node is
//! unknown (its first ancestor that is no I/O object is the whole machine) binds nothing to a node.

use std::collections::{BTreeMap, BTreeSet};

use hwlocality::Topology;
use hwlocality::object::attributes::ObjectAttributes;
use hwlocality::object::types::ObjectType;
use hwlocality::topology::builder::TypeFilter;

use crate::config::{Config, Device, Layout};

/// Why no plan could be made.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TopologyError {
    /// hwloc failed.
    #[error("hwloc cannot read the machine's topology: {0}")]
    Discover(String),
    /// The configuration names a CPU that this process may not use.
    #[error("CPU {cpu} of [lcores] is not one that this process may use; it may use {allowed}")]
    Cpu {
        /// The CPU named.
        cpu: u32,
        /// The CPUs allowed, as a list of ranges.
        allowed: String,
    },
    /// Too few CPUs for one each.
    #[error(
        "layout = \"spread\" needs {needed} CPUs ({rx} rx, {storage} storage), this process may use {have}: \
         use layout = \"shared\", fewer shards, or name the CPUs in [lcores]"
    )]
    TooFew {
        /// CPUs that the layout needs.
        needed: usize,
        /// Of them for rx lcores.
        rx: usize,
        /// Of them for storage lcores.
        storage: usize,
        /// CPUs that may be used.
        have: usize,
    },
}

/// One CPU (a hardware thread).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cpu {
    /// The kernel's number.
    pub id: u32,
    /// Its core; hardware threads of one core share it.
    pub core: u32,
    /// Its NUMA node.
    pub node: Option<u32>,
}

/// What a plan needs to know of the machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Machine {
    /// The CPUs that this process may use, by number.
    pub cpus: Vec<Cpu>,
    /// PCI address → NUMA node, for devices whose node is known.
    pub devices: BTreeMap<String, u32>,
}

/// What one lcore does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lcore {
    /// The CPU it is pinned to.
    pub cpu: u32,
    /// The NUMA node of that CPU.
    pub node: Option<u32>,
    /// Receive queues polled: (index of the port in the configuration, queue).
    pub queues: Vec<(usize, u16)>,
    /// Shards run.
    pub shards: Vec<u16>,
}

/// The lcores, and what is to be told to the operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The lcores in order; lcore ids follow it from 1, 0 being EAL's main lcore, which floats.
    pub lcores: Vec<Lcore>,
    /// Remarks for the start-up log.
    pub notes: Vec<String>,
}

impl Machine {
    /// Asks hwloc. Costs a few milliseconds.
    pub fn discover() -> Result<Self, TopologyError> {
        let failed = |e: &dyn std::fmt::Display| TopologyError::Discover(e.to_string());
        let topology = Topology::builder()
            .with_type_filter(ObjectType::PCIDevice, TypeFilter::KeepAll)
            .map_err(|e| failed(&e))?
            .build()
            .map_err(|e| failed(&e))?;
        let allowed = topology.allowed_cpuset();
        let affinity = allowed_by_affinity();
        let mut cpus: Vec<Cpu> = topology
            .objects_with_type(ObjectType::PU)
            .filter_map(|pu| {
                let id = u32::try_from(pu.os_index()?).ok()?;
                let usable = allowed.iter_set().any(|i| usize::from(i) == id as usize)
                    && affinity.contains(&id);
                let core = pu
                    .first_ancestor_with_type(ObjectType::Core)
                    .map_or(id, |core| core.logical_index() as u32);
                usable.then(|| Cpu {
                    id,
                    core,
                    node: single_node(pu),
                })
            })
            .collect();
        cpus.sort_by_key(|cpu| cpu.id);
        let devices = topology
            .pci_devices()
            .filter_map(|device| {
                let Some(ObjectAttributes::PCIDevice(pci)) = device.attributes() else {
                    return None;
                };
                let ancestor = device.first_non_io_ancestor()?;
                if ancestor.object_type() == ObjectType::Machine
                    && topology.nodeset().weight() != Some(1)
                {
                    return None;
                }
                let address = format!(
                    "{:04x}:{:02x}:{:02x}.{}",
                    pci.domain(),
                    pci.bus_id(),
                    pci.bus_device(),
                    pci.function()
                );
                Some((address, single_node(ancestor)?))
            })
            .collect();
        Ok(Self { cpus, devices })
    }

    fn node_of(&self, cpu: u32) -> Option<u32> {
        self.cpus.iter().find(|c| c.id == cpu)?.node
    }

    fn allowed(&self) -> String {
        let ids: Vec<String> = self.cpus.iter().map(|cpu| cpu.id.to_string()).collect();
        ids.join(", ")
    }
}

/// The object's NUMA node, where it has exactly one.
fn single_node(object: &hwlocality::object::TopologyObject) -> Option<u32> {
    let set = object.nodeset()?;
    let mut nodes = set.iter_set();
    let first = usize::from(nodes.next()?);
    if nodes.next().is_some() {
        None
    } else {
        u32::try_from(first).ok()
    }
}

/// The CPUs of the process's affinity mask (taskset, cpusets).
fn allowed_by_affinity() -> BTreeSet<u32> {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let list = text
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"))
        .unwrap_or("");
    cpu_list(list.trim())
}

/// Parses the kernel's list format, `0-3,8`.
fn cpu_list(text: &str) -> BTreeSet<u32> {
    text.split(',')
        .filter_map(|range| {
            let (from, to) = range.split_once('-').unwrap_or((range, range));
            Some(from.trim().parse().ok()?..=to.trim().parse().ok()?)
        })
        .flatten()
        .collect()
}

/// Places the configuration's queues and shards on the machine.
pub fn plan(config: &Config, machine: &Machine) -> Result<Plan, TopologyError> {
    let named = config.lcores.rx.iter().chain(&config.lcores.storage);
    for &cpu in named {
        if machine.cpus.iter().all(|c| c.id != cpu) {
            return Err(TopologyError::Cpu {
                cpu,
                allowed: machine.allowed(),
            });
        }
    }
    let mut notes = Vec::new();
    let port_nodes: Vec<Option<u32>> = config
        .ports
        .iter()
        .map(|port| match &port.device {
            Device::Pci(address) => {
                let node = machine.devices.get(address).copied();
                if node.is_none() && machine.cpus.iter().any(|cpu| cpu.node > Some(0)) {
                    notes.push(format!("port {}: the NUMA node of {address} is unknown; nothing is bound to a node for it", port.name));
                }
                node
            }
            _ => None,
        })
        .collect();
    let shards: Vec<u16> = (0..config.storage.shards).collect();
    let queues = |ports: &mut dyn Iterator<Item = usize>| -> Vec<(usize, u16)> {
        ports
            .filter(|&p| !config.ports[p].is_kernel())
            .flat_map(|p| (0..config.ports[p].queues).map(move |q| (p, q)))
            .collect()
    };

    let lcores = match config.lcores.layout {
        Layout::Shared => {
            let home = port_nodes.iter().copied().flatten().next();
            let cpu = match config.lcores.rx.first() {
                Some(&cpu) => cpu,
                // The last CPU: the first ones serve most interrupts.
                None => *choose(machine, home, &mut BTreeSet::new(), 1)
                    .first()
                    .ok_or(TopologyError::TooFew {
                        needed: 1,
                        rx: 1,
                        storage: 0,
                        have: 0,
                    })?,
            };
            vec![Lcore {
                cpu,
                node: machine.node_of(cpu),
                queues: queues(&mut (0..config.ports.len())),
                shards,
            }]
        }
        Layout::Spread => {
            let mut taken: BTreeSet<u32> = config
                .lcores
                .rx
                .iter()
                .chain(&config.lcores.storage)
                .copied()
                .collect();
            // Ports of kernel sockets have no queues.
            let homes: BTreeSet<Option<u32>> = config
                .dpdk_ports()
                .map(|(place, _)| port_nodes[place])
                .collect();
            let rx_wanted = homes.len();
            let have = machine.cpus.len();
            let rx_count = if config.lcores.rx.is_empty() {
                rx_wanted
            } else {
                config.lcores.rx.len()
            };
            let too_few = TopologyError::TooFew {
                needed: rx_count + shards.len(),
                rx: rx_count,
                storage: shards.len(),
                have,
            };
            let mut rx = config.lcores.rx.clone();
            if rx.is_empty() {
                for home in &homes {
                    rx.extend(choose(machine, *home, &mut taken, 1));
                }
                if rx.len() < rx_wanted {
                    return Err(too_few);
                }
            }
            let mut storage = config.lcores.storage.clone();
            if storage.is_empty() {
                let home = homes.iter().copied().flatten().next();
                storage = choose(machine, home, &mut taken, shards.len());
                if storage.len() < shards.len() {
                    return Err(too_few);
                }
            }
            if rx.len() + storage.len() == have {
                notes.push(
                    "every CPU is an lcore: the control socket and readers share them".to_owned(),
                );
            }
            let mut lcores: Vec<Lcore> = rx
                .iter()
                .map(|&cpu| Lcore {
                    cpu,
                    node: machine.node_of(cpu),
                    queues: Vec::new(),
                    shards: Vec::new(),
                })
                .collect();
            // A queue goes to the lcore with the fewest, on its port's node where there is one.
            for (port, queue) in queues(&mut (0..config.ports.len())) {
                let near =
                    |lcore: &Lcore| port_nodes[port].is_none() || lcore.node == port_nodes[port];
                let pick =
                    (0..lcores.len()).min_by_key(|&i| (!near(&lcores[i]), lcores[i].queues.len()));
                if let Some(pick) = pick {
                    if !near(&lcores[pick]) {
                        notes.push(format!(
                            "port {} queue {queue}: CPU {} is on another NUMA node",
                            config.ports[port].name, lcores[pick].cpu
                        ));
                    }
                    lcores[pick].queues.push((port, queue));
                }
            }
            for lcore in &lcores {
                if lcore.queues.is_empty() {
                    notes.push(format!(
                        "CPU {}: no queue is left for this rx lcore; give the ports more `queues`",
                        lcore.cpu
                    ));
                }
            }
            lcores.retain(|lcore| !lcore.queues.is_empty());
            lcores.extend(storage.iter().zip(&shards).map(|(&cpu, &shard)| Lcore {
                cpu,
                node: machine.node_of(cpu),
                queues: Vec::new(),
                shards: vec![shard],
            }));
            lcores
        }
    };
    Ok(Plan { lcores, notes })
}

/// Picks up to `count` CPUs that are not `taken` and takes them: on node `home` first, whole cores
/// before second hardware threads, high numbers first since the first CPUs serve most interrupts.
fn choose(
    machine: &Machine,
    home: Option<u32>,
    taken: &mut BTreeSet<u32>,
    count: usize,
) -> Vec<u32> {
    let mut picked = Vec::new();
    for _ in 0..count {
        let busy: BTreeSet<u32> = machine
            .cpus
            .iter()
            .filter(|c| taken.contains(&c.id))
            .map(|c| c.core)
            .collect();
        let best = machine
            .cpus
            .iter()
            .filter(|cpu| !taken.contains(&cpu.id))
            .min_by_key(|cpu| {
                (
                    home.is_some() && cpu.node != home,
                    busy.contains(&cpu.core),
                    std::cmp::Reverse(cpu.id),
                )
            });
        let Some(best) = best else { break };
        taken.insert(best.id);
        picked.push(best.id);
    }
    picked
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    /// `nodes` × `cores` cores with two hardware threads each, numbered as Linux does.
    fn machine(nodes: u32, cores: u32) -> Machine {
        let all = nodes * cores;
        let cpus = (0..2 * all)
            .map(|id| Cpu {
                id,
                core: id % all,
                node: Some(id % all / cores),
            })
            .collect();
        let devices = (0..nodes)
            .map(|n| (format!("0000:{:02x}:00.0", 0x10 * (n + 1)), n))
            .collect();
        Machine { cpus, devices }
    }

    fn config(text: &str) -> Config {
        let text = format!("[storage]\npath = \"/d\"\n{text}");
        Config::parse(&text, Path::new("t.toml")).unwrap()
    }

    const TWO_PORTS: &str = "[[port]]\nname = \"a\"\ndevice = \"10:00.0\"\nqueues = 2\n[[port]]\nname = \"b\"\ndevice = \"20:00.0\"\nqueues = 2\n";

    #[test]
    fn shared_puts_everything_on_one_cpu_of_the_ports_node() {
        let plan = plan(&config(TWO_PORTS), &machine(2, 4)).unwrap();
        assert_eq!(plan.lcores.len(), 1);
        assert_eq!(plan.lcores[0].cpu, 11);
        assert_eq!(plan.lcores[0].node, Some(0));
        assert_eq!(plan.lcores[0].queues, [(0, 0), (0, 1), (1, 0), (1, 1)]);
        assert_eq!(plan.lcores[0].shards, [0]);
    }

    #[test]
    fn spread_keeps_queues_on_their_node_and_cores_apart() {
        let text = format!("shards = 2\n[lcores]\nlayout = \"spread\"\n{TWO_PORTS}");
        let plan = plan(&config(&text), &machine(2, 4)).unwrap();
        let queues: Vec<_> = plan
            .lcores
            .iter()
            .map(|l| (l.node, l.queues.clone()))
            .collect();
        assert_eq!(queues[0], (Some(0), vec![(0, 0), (0, 1)]));
        assert_eq!(queues[1], (Some(1), vec![(1, 0), (1, 1)]));
        let cores: BTreeSet<u32> = plan.lcores.iter().map(|l| l.cpu % 8).collect();
        assert_eq!(cores.len(), 4, "{plan:?}");
        assert_eq!(plan.lcores[2].shards, [0]);
        assert_eq!(plan.lcores[3].shards, [1]);
    }

    #[test]
    fn two_cpus_carry_one_rx_and_one_storage_lcore_and_no_more() {
        let mut small = machine(1, 1);
        small.devices.clear();
        let port = "[[port]]\nname = \"a\"\ndevice = \"net_null0\"\n";
        let spread = format!("[lcores]\nlayout = \"spread\"\n{port}");
        assert_eq!(plan(&config(&spread), &small).unwrap().lcores.len(), 2);
        let error = plan(&config(&format!("shards = 2\n{spread}")), &small).unwrap_err();
        assert_eq!(
            error,
            TopologyError::TooFew {
                needed: 3,
                rx: 1,
                storage: 2,
                have: 2
            }
        );
        let error = plan(&config("[lcores]\ncpu = 9\n"), &small).unwrap_err();
        assert!(error.to_string().contains("CPU 9") && error.to_string().contains("0, 1"));
    }

    #[test]
    fn kernel_ports_take_no_lcore() {
        let mut small = machine(1, 1);
        small.devices.clear();
        let port = "[[port]]\nname = \"k\"\ndevice = \"kernel\"\naddresses = [\"::1\"]\n";
        let spread = format!("shards = 2\n[lcores]\nlayout = \"spread\"\n{port}");
        for (text, lcores) in [(port, 1), (spread.as_str(), 2)] {
            let plan = plan(&config(text), &small).unwrap();
            assert_eq!(plan.lcores.len(), lcores, "{text}");
            assert!(plan.lcores.iter().all(|lcore| lcore.queues.is_empty()));
        }
    }

    #[test]
    fn unknown_node_binds_nothing_and_says_so() {
        let mut machine = machine(2, 2);
        machine.devices.clear();
        let text = format!("[lcores]\nlayout = \"spread\"\nrx = [0, 1]\n{TWO_PORTS}");
        let plan = plan(&config(&text), &machine).unwrap();
        assert_eq!(plan.notes.len(), 2, "{:?}", plan.notes);
        let queues: usize = plan.lcores.iter().map(|l| l.queues.len()).sum();
        assert_eq!(queues, 4);
    }

    #[test]
    fn this_machine_can_be_read_and_planned_for() {
        let machine = Machine::discover().unwrap();
        assert!(!machine.cpus.is_empty());
        assert!(plan(&config(""), &machine).is_ok());
    }

    #[test]
    fn kernel_cpu_lists() {
        assert_eq!(cpu_list("0-2,5"), BTreeSet::from([0, 1, 2, 5]));
        assert_eq!(cpu_list(""), BTreeSet::new());
    }
}
