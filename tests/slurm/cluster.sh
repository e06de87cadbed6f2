#!/usr/bin/env bash
# A real SLURM cluster for tests, on this machine, without systemd. Needs Linux, root and the packages of SLURM.
#
#   cluster.sh install        the packages of SLURM (Debian, Ubuntu)
#   cluster.sh start [NODES]  start this many nodes, 2 by default: node1, node2 ...
#   cluster.sh lose NODE      kill everything that runs on a node, SLURM's own processes too
#   cluster.sh restore NODE   start a lost node again
#   cluster.sh stop           cancel all jobs, end every process, remove the networks; state and logs stay
#
# Then, with the same CLUSTER_DIR:  export SLURM_CONF=$CLUSTER_DIR/slurm.conf; srun -N 2 hostname
#
# Each node is a network, UTS and mount namespace: it has its own address, ports, host name and /etc/hosts, so that
# localhost means another machine on each, as on a real cluster. Processes are seen and can be killed from outside. Nodes
# claim CPUs and GPUs that need not be there.
#
#   CLUSTER_DIR    folder of configuration, state and logs; short, without spaces   /tmp/slurm-cluster-UID
set -euo pipefail

DIR=${CLUSTER_DIR:-/tmp/slurm-cluster-$(id -u)}
CPUS=8
GPUS=(/dev/null /dev/zero) # any device files do: nobody opens them
SUBNET=10.213.78
PORT=16827
PATH=$PATH:/usr/sbin:/sbin
CONF=$DIR/slurm.conf
SOCKET=$DIR/run/munge.sock
ID=$(printf '%x' "$(printf '%s' "$DIR" | cksum | cut -d' ' -f1)") # in the names of namespaces and links
export SLURM_CONF=$CONF

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 1
}

# ------------------------------------------------------------------------------------------------------------- processes

alive() { # PID: exists and is no zombie, which the first process of a container may never reap
    local state
    state=$(sed 's/.*) //' "/proc/$1/stat" 2>/dev/null) || return 1
    [[ -n "$state" && "${state:0:1}" != [ZX] ]]
}

daemon() { # NAME: prints the PID of munged, slurmctld or slurmd-NODE if it is ours and runs
    local pid
    pid=$(cat "$DIR/run/$1.pid" 2>/dev/null) || return 1
    alive "$pid" && tr '\0' ' ' <"/proc/$pid/cmdline" | grep -qF -- "$DIR/" && echo "$pid"
}

end() { # PID: SIGTERM, and SIGKILL after 5 s
    kill -TERM "$1" 2>/dev/null || true
    for _ in {1..50}; do
        if ! alive "$1"; then return; fi
        sleep 0.1
    done
    kill -KILL "$1" 2>/dev/null || true
}

wait_for() { # SECONDS COMMAND...
    local until=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < until)) || fail "'$*' does not come true; see $DIR/log"
        sleep 0.1
    done
}

# --------------------------------------------------------------------------------------------------------------- network

namespace() { echo "sc$ID-$1"; }

network_up() {
    local i node ns
    ip link add "sb$ID" type bridge || fail "no network namespaces here: root with CAP_NET_ADMIN is needed"
    ip addr add "$SUBNET.254/24" dev "sb$ID"
    ip link set "sb$ID" up
    {
        printf '127.0.0.1 localhost\n::1 localhost\n%s.254 %s\n' "$SUBNET" "$(hostname -s)"
        for i in "${!NODES[@]}"; do echo "$SUBNET.$((i + 1)) ${NODES[i]}"; done
    } >"$DIR/hosts"
    # nodes have no name server: without these a reverse lookup, as torch's TCPStore does, would wait for one
    echo "hosts: files" >"$DIR/nsswitch.conf"
    if [[ -r /etc/nsswitch.conf ]]; then
        grep -v '^[[:space:]]*hosts:' /etc/nsswitch.conf >>"$DIR/nsswitch.conf" || true
    fi
    echo "nameserver 127.0.0.1" >"$DIR/resolv.conf"
    for i in "${!NODES[@]}"; do
        node=${NODES[i]}
        ns=$(namespace "$node")
        ip netns add "$ns" || fail "no network namespaces here: root with CAP_SYS_ADMIN is needed"
        ip link add "s$((i + 1))v$ID" type veth peer name eth0 netns "$ns"
        ip link set "s$((i + 1))v$ID" master "sb$ID" up
        ip -n "$ns" addr add "$SUBNET.$((i + 1))/24" dev eth0
        ip -n "$ns" link set lo up
        ip -n "$ns" link set eth0 up
        ip -n "$ns" route add default via "$SUBNET.254"
    done
}

network_down() {
    local i
    for i in "${!NODES[@]}"; do
        ip link del "s$((i + 1))v$ID" 2>/dev/null || true
        ip netns del "$(namespace "${NODES[i]}")" 2>/dev/null || true
    done
    ip link del "sb$ID" 2>/dev/null || true
}

# --------------------------------------------------------------------------------------------------------- configuration

write_epilog() { # ProctrackType linuxproc loses processes whose parent died, such as torchrun's: end these with the job
    cat >"$DIR/epilog" <<END
#!/usr/bin/env bash
for file in \$(grep -lzxF "SLURM_JOB_ID=\$SLURM_JOB_ID" /proc/[0-9]*/environ 2>/dev/null); do
    pid=\${file#/proc/}
    pid=\${pid%/environ}
    if ((pid != \$\$)) && [[ \$(cat /proc/\$pid/comm 2>/dev/null) != slurm* ]] &&
        grep -qzxF "SLURM_CONF=$CONF" \$file 2>/dev/null &&
        grep -qzxF "SLURMD_NODENAME=\$SLURMD_NODENAME" \$file 2>/dev/null; then
        kill -KILL \$pid 2>/dev/null
    fi
done
exit 0
END
    chmod 755 "$DIR/epilog"
}

write_configuration() {
    local i
    write_epilog
    : >"$DIR/plugstack.conf"
    printf 'CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\n' >"$DIR/cgroup.conf"
    printf 'Name=gpu File=%s\n' "${GPUS[@]}" >"$DIR/gres.conf"
    cat >"$CONF" <<END
ClusterName=test
SlurmctldHost=$(hostname -s)($SUBNET.254)
SlurmctldPort=$PORT
SlurmdPort=$((PORT + 1))
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$SOCKET,cred_expire=5
CredType=cred/munge
StateSaveLocation=$DIR/controller
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd-%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd-%n.log
PlugStackConfig=$DIR/plugstack.conf
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
Epilog=$DIR/epilog
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,sched_min_interval=0
MessageTimeout=5
KillWait=15
SlurmdTimeout=30
InactiveLimit=0
ReturnToService=2
MinJobAge=86400
END
    for i in "${!NODES[@]}"; do
        echo "NodeName=${NODES[i]} NodeHostname=${NODES[i]} NodeAddr=$SUBNET.$((i + 1)) Port=$((PORT + 1))" \
            "CPUs=$CPUS RealMemory=64000 Gres=gpu:${#GPUS[@]} State=UNKNOWN"
    done >>"$CONF"
    echo "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP" >>"$CONF"
}

# -------------------------------------------------------------------------------------------------------------- commands

start_munged() {
    munged --force --socket="$SOCKET" --key-file="$DIR/munge.key" --pid-file="$DIR/run/munged.pid" \
        --log-file="$DIR/log/munged.log" --seed-file="$DIR/munge.seed" 2>>"$DIR/log/munged.err" ||
        fail "munged does not start; see $DIR/log/munged.err"
}

start_slurmd() { # NODE
    mkdir -p "$DIR/spool/$1"
    # shellcheck disable=SC2016 # the inner shell expands it
    (cd "$DIR" && nsenter --net="/run/netns/$(namespace "$1")" unshare --mount --uts bash -c '
        for file in hosts nsswitch.conf resolv.conf; do
            if [[ -e "/etc/$file" ]]; then mount --bind "$3/$file" "/etc/$file" || exit 1; fi
        done
        ulimit -c 0
        hostname "$2"
        exec slurmd -f "$1" -N "$2"' slurmd "$CONF" "$1" "$DIR") ||
        fail "slurmd of $1 does not start; see $DIR/log/slurmd-$1.log"
}

all_idle() { [[ "$(sinfo -h -N -o '%N %t' | grep -c ' idle$')" == "${#NODES[@]}" ]]; }

start() { # NODES
    local node
    command -v munged slurmctld slurmd sbatch >/dev/null || fail "SLURM is not installed; run: $0 install"
    ((${#SOCKET} < 100)) || fail "CLUSTER_DIR is too long for the name of a socket: $DIR"
    [[ "$DIR" != *[[:space:]]* ]] || fail "CLUSTER_DIR has a space in it: $DIR"
    if [[ -e "$DIR/nodes" ]]; then stop; fi
    mapfile -t NODES < <(seq -f 'node%g' "$1")
    mkdir -p "$DIR"/{run,controller,spool,log}
    chmod 755 "$DIR" "$DIR/run"
    echo "${NODES[*]}" >"$DIR/nodes"
    if [[ ! -s "$DIR/munge.key" ]]; then (umask 077 && head -c 1024 /dev/urandom >"$DIR/munge.key"); fi
    write_configuration
    network_up
    start_munged
    (cd "$DIR" && slurmctld -f "$CONF") || fail "slurmctld does not start; see $DIR/log/slurmctld.log"
    wait_for 15 scontrol ping
    for node in "${NODES[@]}"; do start_slurmd "$node"; done
    wait_for 30 all_idle
}

lose() { # NODE: slurmd and all that it runs; it has nothing to save
    ip netns pids "$(namespace "$1")" 2>/dev/null | xargs -r kill -KILL 2>/dev/null || true
}

restore() { # NODE
    read -r -a NODES <"$DIR/nodes"
    lose "$1"
    start_slurmd "$1"
    scontrol update "nodename=$1" state=resume 2>/dev/null || true # it may be so already
    wait_for 60 all_idle
}

stop() {
    local node pid
    [[ -e "$DIR/nodes" ]] || return 0
    read -r -a NODES <"$DIR/nodes"
    if daemon slurmctld >/dev/null; then
        timeout 5 scancel --me --state=PENDING || true
        timeout 5 scancel --me --full --signal=KILL || true
    fi
    if pid=$(daemon slurmctld); then end "$pid"; fi
    for node in "${NODES[@]}"; do lose "$node"; done
    if pid=$(daemon munged); then end "$pid"; fi
    network_down
    rm -rf "$DIR/nodes" "$DIR/run"
}

install() {
    local policy=/usr/sbin/policy-rc.d # the packages are not to start daemons of their own
    command -v apt-get >/dev/null || fail "no apt-get; install slurmctld, slurmd, SLURM's commands, munge and iproute2"
    apt-get update -qq
    if [[ ! -e "$policy" ]]; then
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    fi
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        slurmctld slurmd slurm-client munge iproute2 util-linux
}

case "${1:-}" in
    install) install ;;
    start) start "${2:-2}" ;;
    lose) lose "${2:?NODE}" ;;
    restore) restore "${2:?NODE}" ;;
    stop) stop ;;
    *) fail "expected install, start, lose, restore or stop; got '${1:-}'" ;;
esac
