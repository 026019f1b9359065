// How a call is cut into parts, and how finely (parts.h). Host only.
#include "parts.h"

namespace autofocus::cuda {

namespace {

// Whether a pass may be cut into `parts` parts of so many tiles.
bool is_allowed(const Cost& allowed, const Work& pass, int64_t parts, int64_t tiles_of_part) {
  const int64_t rounds = ceil_div(pass.tiles, pass.at_once), of_part = ceil_div(tiles_of_part, pass.at_once);
  return of_part >= allowed.least_rounds && 100 * parts * of_part <= (100 + allowed.percent) * rounds;
}

int input_points_z(const Problem& g) { return lattice_points(g.input, common_step(g)).z; }

}  // namespace

Part part_of(const Problem& g, const Split& split, int64_t index) {
  const Int3 step = common_step(g);
  const int slab = int(index % split.slabs);
  index /= split.slabs;
  const Index3 c = unravel(index % volume(split.classes), {split.classes.z, split.classes.y, split.classes.x});
  Part part{};
  part.samples = g.N / split.samples;
  part.first_sample = index / volume(split.classes) * part.samples;
  const auto choose = [&](int Int3::* axis, int64_t Index3::* wide) {
    const bool one = split.classes.*axis > 1;
    part.output.count.*axis = part.input.count.*axis = one ? 1 : step.*axis;
    part.output.first.*axis = one ? int(c.*wide) : 0;
    part.input.first.*axis = one ? int(input_lattice(g.origin.*wide, c.*wide, step.*axis).phase) : 0;
  };
  choose(&Int3::z, &Index3::z);
  choose(&Int3::y, &Index3::y);
  choose(&Int3::x, &Index3::x);

  const auto clip = [](int64_t value, int64_t most) { return int(value < 0 ? 0 : value > most ? most : value); };
  const int points = input_points_z(g), output_points = lattice_points(g.output, step).z;
  part.input_planes = {0, points};
  part.output_planes = {0, output_points};
  if (split.slabs > 1) {
    const int most = slab_planes(points, split.slabs), first = slab * most;
    part.input_planes = {first, clip(points - first, most)};
    // Input class 0 reads output planes around first + origin, the other classes around that or one plane further on.
    const int64_t origin = input_lattice(-g.origin.z, 0, step.z).point, halo = step_and_halo(g, &Index3::z).halo;
    const int begin = clip(first + origin - halo, output_points - 1);
    const int end = clip(first + part.input_planes.count + origin + 1 + halo, output_points);
    // Where all planes are outside, one of them is packed all the same: a volume of none has no map.
    part.output_planes = {begin, end > begin ? end - begin : 1};
  }
  return part;
}

void restrict_to(Lattice& lattice, const Part& part, Direction direction) {
  const bool forward = direction == Direction::kForward;
  const Slab source = forward ? part.input_planes : part.output_planes,
             target = forward ? part.output_planes : part.input_planes;
  lattice.N = part.samples;
  lattice.points.z = source.count;
  lattice.first_plane = source.first;
  lattice.tiles.z = int(ceil_div(target.count, lattice.tile_z));
  lattice.first_target_plane = target.first;
  choose_classes(lattice, forward ? part.input : part.output, forward ? part.output : part.input);
}

Split split_of(const Problem& g, const std::vector<Work>& passes, const Cost& allowed) {
  const Int3 step = common_step(g);
  // From fine to coarse. Classes of x stay together: they share memory sectors.
  std::vector<Split> candidates = {{g.N, {step.z, step.y, 1}, 1}, {g.N, {step.z, 1, 1}, 1}};
  for (int64_t groups = g.N; groups > 1; --groups)
    if (g.N % groups == 0) candidates.push_back({groups, {1, 1, 1}, 1});
  for (const Split& split : candidates) {
    const int64_t parts = num_parts(split);
    bool all = true;
    for (const Work& pass : passes) all = all && is_allowed(allowed, pass, parts, pass.tiles / parts);
    if (all) return split;
  }
  return {1, {1, 1, 1}, 1};
}

Split split_in_slabs(const Problem& g, const Lattice& lattice, const Work& pass, int64_t wanted, const Cost& allowed) {
  Split split = split_of(g, {pass}, allowed);
  const int64_t parts = num_parts(split), points = input_points_z(g);
  for (int64_t slabs = ceil_div(wanted, parts); slabs > 1; --slabs) {
    const int planes = slab_planes(points, slabs), count = int(ceil_div(points, planes));
    const int64_t tiles = pass.tiles / parts / lattice.tiles.z * ceil_div(planes, lattice.tile_z);
    if (!is_allowed(allowed, pass, parts * count, tiles)) continue;
    split.slabs = count;
    break;
  }
  return split;
}

}  // namespace autofocus::cuda
