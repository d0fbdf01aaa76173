#!/usr/bin/env bash
# bash tests/slurm/cluster.sh start|stop|status: a real Slurm of one machine on the loopback address, with two GPUs that
# are only names. `start` twice is one start; `stop` ends by their process ids only what `start` began, and removes what
# it wrote. Needs root and Debian's or Ubuntu's packages: apt-get install slurm-wlm munge
set -euo pipefail

state=${GRACE_SLURM_STATE:-/var/tmp/grace-slurm}
config=/etc/slurm/slurm.conf # the inner steps of a job look nowhere else
mark="# written by GRACE's tests/slurm/cluster.sh"
cores=$(nproc)
memory=$(awk '/MemTotal/ { print int($2 / 1024 * 0.9) }' /proc/meminfo)

fail() {
  echo "cluster: $1" >&2
  exit 1
}

need() {
  [ "$(id -u)" = 0 ] || fail "needs root, because slurmd starts jobs as their owners; run it in a container or with sudo"
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
  [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$1" ]
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
SlurmdSpoolDir=$state/node
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/slurmd.pid
SlurmctldLogFile=$state/slurmctld.log
SlurmdLogFile=$state/slurmd.log
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
NodeName=localhost NodeAddr=127.0.0.1 CPUs=$cores RealMemory=$memory Gres=gpu:h100:2
PartitionName=main Nodes=localhost Default=YES MaxTime=INFINITE
PartitionName=other Nodes=localhost
END
  cat > /etc/slurm/gres.conf <<END
$mark
NodeName=localhost Name=gpu Type=h100 File=$state/gpu[0-1]
END
}

start() {
  need
  mkdir -p /etc/slurm "$state/controller" "$state/node"
  chmod 755 "$state"
  if ! running slurmd; then
    write_config
  fi
  if ! running munged; then
    [ -e "$state/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom > "$state/munge.key")
    munged --force --key-file "$state/munge.key" --socket "$state/munge.socket" --pid-file "$state/munged.pid" \
      --log-file "$state/munged.log" --seed-file "$state/munge.seed"
  fi
  running slurmctld || slurmctld
  running slurmd || slurmd -N localhost
  local second
  for second in $(seq 60); do
    if [ "$(sinfo --noheader --partition main --format %T 2>/dev/null)" = idle ]; then
      echo "cluster: Slurm is up with $cores cores, $memory MB and 2 named GPUs"
      return
    fi
    sleep 1
  done
  tail -n 20 "$state"/slurm*.log >&2
  fail "the node is not idle after 60 s; the logs are in $state"
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
  for name in slurmd slurmctld munged; do
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
