#!/usr/bin/env bash
# bash tests/slurm/cluster.sh start|stop|status: a real Slurm on the loopback address, four nodes on this one machine.
# Its eight cores, memory and two GPUs per node are only names, so that jobs that mostly wait run side by side. `start`
# twice is one start; `stop` ends by their process ids only what `start` began, and removes what it wrote. Needs root
# and Debian's or Ubuntu's packages: apt-get install slurm-wlm munge
set -euo pipefail

state=${GRACE_SLURM_STATE:-/var/tmp/grace-slurm}
config=/etc/slurm/slurm.conf # the inner steps of a job look nowhere else
mark="# written by GRACE's tests/slurm/cluster.sh"
nodes=(first second third fourth)

fail() {
  echo "cluster: $1" >&2
  exit 1
}

need() {
  [ "$(id -u)" = 0 ] || fail "needs root, for slurmd starts jobs as their owners; run it in a container or with sudo"
  local program
  for program in munged slurmctld slurmd sbatch; do
    [ -n "$(command -v "$program")" ] || fail "$program is not installed; apt-get install slurm-wlm munge"
  done
  if [ -e "$config" ] && ! grep -qF "$mark" "$config"; then
    fail "$config belongs to another Slurm; use a machine without one"
  fi
}

running() { # is the process of a pid file alive, and still the program that was started?
  local pid
  pid=$(cat "$state/$1.pid" 2>/dev/null) || return 1
  [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "${1%-*}" ]
}

write_config() {
  local number
  for number in 0 1; do
    [ -e "$state/gpu$number" ] || mknod "$state/gpu$number" c 195 "$number"
  done
  cat > "$config" <<END
$mark
ClusterName=grace
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$state/munge.socket
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation=$state/controller
SlurmdSpoolDir=$state/%n
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/slurmd-%n.pid
SlurmctldLogFile=$state/slurmctld.log
SlurmdLogFile=$state/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5
JobAcctGatherParams=OverMemoryKill
MinJobAge=3600
KillWait=5
ReturnToService=2
SchedulerParameters=batch_sched_delay=1,sched_interval=5
GresTypes=gpu
NodeName=first,second,third,fourth NodeHostname=localhost NodeAddr=127.0.0.1 \
Port=[16818-16821] CPUs=8 RealMemory=32000 Gres=gpu:h100:2
PartitionName=main Nodes=first Default=YES MaxTime=INFINITE
PartitionName=other Nodes=second
PartitionName=both Nodes=first,second
PartitionName=spare Nodes=third
PartitionName=scraps Nodes=fourth PriorityTier=1
PartitionName=urgent Nodes=fourth PriorityTier=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
END
  cat > /etc/slurm/gres.conf <<END
$mark
NodeName=first,second,third,fourth Name=gpu Type=h100 File=$state/gpu[0-1]
END
}

start() {
  need
  mkdir -p /etc/slurm "$state/controller" "${nodes[@]/#/$state/}"
  chmod 755 "$state"
  running slurmctld || write_config
  if ! running munged; then
    [ -e "$state/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom > "$state/munge.key")
    munged --force --key-file "$state/munge.key" --socket "$state/munge.socket" --pid-file "$state/munged.pid" \
      --log-file "$state/munged.log" --seed-file "$state/munge.seed"
  fi
  running slurmctld || slurmctld
  local node second
  for node in "${nodes[@]}"; do
    running "slurmd-$node" || slurmd -N "$node"
  done
  for second in $(seq 60); do
    if [ "$(sinfo --noheader --format %T 2>/dev/null | sort -u)" = idle ]; then
      echo "cluster: Slurm is up with nodes ${nodes[*]}"
      return
    fi
    sleep 1
  done
  tail -n 20 "$state"/slurm*.log >&2
  fail "the nodes are not idle after 60 s; the logs are in $state"
}

stop() {
  local name pid second
  if running slurmctld; then
    scancel --user root --quiet 2>/dev/null || true
    for second in $(seq 30); do
      [ -n "$(squeue --noheader --states running,completing 2>/dev/null)" ] || break
      sleep 1
    done
  fi
  for name in "${nodes[@]/#/slurmd-}" slurmctld munged; do
    if running "$name"; then
      pid=$(cat "$state/$name.pid")
      kill "$pid"
      for second in $(seq 30); do
        running "$name" || break
        sleep 1
      done
      ! running "$name" || fail "$name (process $pid) does not end; the logs are in $state"
    fi
  done
  for name in slurm.conf gres.conf; do
    if grep -qF "$mark" "/etc/slurm/$name" 2>/dev/null; then rm "/etc/slurm/$name"; fi
  done
  rm -rf "$state"
  echo "cluster: Slurm is down"
}

case "${1:-}" in
  start) start ;;
  stop) stop ;;
  status) sinfo --Node --format "%N %T %c cores %m MB %G" && squeue --format "%i %T %l %m %b %k" ;;
  *) fail "use start, stop or status" ;;
esac
